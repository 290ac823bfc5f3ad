// Charts: raw values faint behind smoothed ones, both to scale; nothing is clipped away.
const COLOURS = {generator: 0, "D(G(z))": 0, discriminator: 1, "D(x)": 2};  // the same in every chart
const MARKED = ["nan", "rollback", "resume", "warning"];  // events that a chart shows
const FEW = 60, DOTS = 24;  // points: a curve of no more is never smoothed, or has a dot at each
const markers = [];  // one function per chart: show the number of images that the film is at

/** Round values that divide [low, high] into about `count` parts. */
function ticks(low, high, count, log) {
  if (log) {
    const out = [], from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
    const every = Math.ceil((to - from) / count), steps = to - from > 2 ? [1] : [1, 2, 5];
    for (let power = from; power <= to; power += every) for (const s of steps) out.push(s * 10 ** power);
    return out.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) out.push(k * step + 0);
  return out;
}

/** Exponential moving average without the bias of its start (Kingma and Ba 2015, section 3). */
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

/** Place of the value of a sorted list that is nearest to x. */
function nearest(sorted, x) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (sorted[mid] < x) low = mid; else high = mid; }
  return Math.abs(sorted[low] - x) <= Math.abs(sorted[high] - x) ? low : high;
}

/** Give every curve its colour: that of its run, that of its name, or the next one free. */
function paint(series) {
  const taken = new Set(series.map(({label}) => COLOURS[label]));
  const free = [...Array(PAINTS).keys()].filter((c) => !taken.has(c));
  let next = 0;
  for (const s of series) {
    const place = s.run ?? COLOURS[s.label] ?? free[next++ % free.length];
    s.paint = `var(--c${place % PAINTS})`;
    s.dash = place < PAINTS ? null : "7 4";  // a seventh run has the first one's colour, dashed
  }
}

/** Lowest and highest value to show, or null where there is none. shares: they lie from 0 to 1. */
function limits(shares, series, log) {
  let low = Infinity, high = -Infinity;
  for (const s of series) for (const y of s.y) {
    if (y === null || (log && y <= 0)) continue;
    if (y < low) low = y;
    if (y > high) high = y;
  }
  if (low > high) return null;
  if (log) return low === high ? [low / 2, high * 2] : [low, high];
  if (shares && low >= 0) return [0, Math.max(1, high)];
  if (low > 0 && low < .5 * high) low = 0;
  if (low === high) return low ? [Math.min(0, 2 * low), Math.max(0, 2 * low)] : [0, 1];
  const room = .04 * (high - low);
  return [low === 0 ? 0 : low - room, high + room];
}

class Chart {
  /** last: the largest number of images of the page. smoothing: gives the slider's value. */
  constructor({title, unit, smooth, note, series}, last, smoothing) {
    Object.assign(this, {unit, smooth, series, last, smoothing});
    this.shares = unit === "sigmoid" || title === "Precision and recall";
    this.height = 210;
    this.box = {left: 50, right: 14, top: 10, bottom: 24};
    this.hidden = new Set();
    this.most = Math.max(...series.map(({x}) => x.length));
    this.log = false;
    this.scale = this.mark = this.hair = null;
    paint(series);
    this.plot = el("svg:svg", {role: "img", "aria-label": title, height: this.height});
    this.tip = el("div", {class: "tip", hidden: true});
    this.node = el("figure", {class: "card"},
      el("div", {class: "row"}, el("h3", {}, title), unit ? el("small", {}, unit) : null, this.toggle()),
      this.plot, this.legend(), note ? el("p", {class: "soft note"}, note) : null, this.tip);
    for (const name of ["pointermove", "pointerdown"]) this.plot.addEventListener(name, (event) => this.hover(event));
    for (const name of ["pointerleave", "pointercancel"]) this.plot.addEventListener(name, () => this.leave());
    new ResizeObserver(() => this.draw()).observe(this.plot);
    markers.push((images) => { this.mark = images; this.draw(); });
  }

  get shown() { return this.series.filter((s) => !this.hidden.has(s)); }

  toggle() {
    const button = el("button", {class: "push", "aria-pressed": "false", click: () => {
      this.log = !this.log; button.setAttribute("aria-pressed", String(this.log)); this.draw();
    }}, "log");
    return button;
  }

  legend() {
    return el("div", {class: "legend"}, ...this.series.map((s) => {
      const button = el("button", {title: s.key, "aria-pressed": "true", click: () => {
        if (!this.hidden.delete(s)) this.hidden.add(s);
        button.setAttribute("aria-pressed", String(!this.hidden.has(s))); this.draw();
      }}, swatch(s.paint), `${s.label} `, el("span", {class: "soft"}, show(s.y[s.y.length - 1])));
      return button;
    }));
  }

  draw() {
    const width = this.plot.clientWidth, {left, right, top, bottom} = this.box;
    this.plot.replaceChildren();
    if (!width) return;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    const range = limits(this.shares, this.shown, this.log), f = this.log ? Math.log : (v) => v;
    this.hair = null;
    if (!range) {
      const words = this.log ? "nothing above zero to show" : "no finite values";
      this.plot.append(el("svg:text", {x: left, y: this.height / 2}, words));
      return;
    }
    const [low, high] = range, inner = width - left - right, tall = this.height - top - bottom;
    this.scale = {inner, x: (x) => left + inner * x / this.last,
      y: (y) => top + tall * (f(high) - f(y)) / (f(high) - f(low))};
    this.axes(low, high, width);
    this.rules();
    this.shown.forEach((s) => this.curve(s));
    this.hair = this.plot.appendChild(this.rule(0, "var(--soft)", "none"));
    this.hair.setAttribute("visibility", "hidden");
  }

  axes(low, high, width) {
    const {left, right} = this.box, {x: at, y: over, inner} = this.scale;
    for (const y of ticks(low, high, 4, this.log)) this.plot.append(
      el("svg:line", {x1: left, x2: width - right, y1: over(y), y2: over(y), stroke: "var(--rule)"}),
      el("svg:text", {x: left - 7, y: over(y) + 4, "text-anchor": "end"},
        Math.abs(y) >= 1e4 ? short(y) : show(Number(y.toPrecision(6)))));
    for (const x of ticks(0, this.last, Math.max(2, inner / 70), false)) this.plot.append(el("svg:text",
      {x: at(x), y: this.height - 7, "text-anchor": at(x) > width - 30 ? "end" : "middle"}, short(x)));
  }

  rules() {
    for (const {kind, images, text} of data.events) if (MARKED.includes(kind) && images !== null)
      this.plot.append(this.rule(this.scale.x(images), kind === "nan" ? "var(--bad)" : "var(--soft)", "2 4",
        `${kind} at ${whole(images)} images: ${text}`));
    if (this.mark !== null) this.plot.append(this.rule(this.scale.x(this.mark), "var(--c0)", "5 3"));
  }

  rule(x, stroke, dash, words) {
    const line = el("svg:line", {x1: x, x2: x, y1: this.box.top, y2: this.height - this.box.bottom,
      stroke, "stroke-dasharray": dash});
    if (words) line.append(el("svg:title", {}, words));
    return line;
  }

  curve(s) {
    const weight = this.smooth && this.most > FEW ? this.smoothing() : 0;
    const line = {fill: "none", stroke: s.paint, "stroke-width": 1.6, "stroke-linejoin": "round",
      "stroke-linecap": "round", "stroke-dasharray": s.dash};
    this.plot.append(el("svg:path", {...line, d: this.path(s, s.y), opacity: weight ? .28 : 1}));
    if (weight) this.plot.append(el("svg:path", {...line, d: this.path(s, smoothed(s.y, weight))}));
    if (s.x.length <= DOTS) this.plot.append(el("svg:path",
      {...line, d: this.path(s, s.y, true), "stroke-width": 5, "stroke-dasharray": null}));
  }

  /** The line through the points, or a dot at each. */
  path(s, values, dots = false) {
    let text = "", pen = false;
    values.forEach((y, place) => {
      if (y === null || (this.log && y <= 0)) { pen = false; return; }
      text += `${pen ? "L" : "M"}${this.scale.x(s.x[place]).toFixed(1)} ${this.scale.y(y).toFixed(1)}${pen ? "" : "h0"}`;
      pen = !dots;
    });
    return text;
  }

  leave() { this.tip.hidden = true; this.hair?.setAttribute("visibility", "hidden"); }

  hover(event) {
    const edge = this.plot.getBoundingClientRect(), {scale, hair, shown, tip} = this;
    if (!hair || !shown.length) return this.leave();
    const x = (event.clientX - edge.left - this.box.left) / scale.inner * this.last;
    const near = shown.map((s) => s.x[nearest(s.x, x)]);
    const at = near.reduce((best, one) => Math.abs(one - x) < Math.abs(best - x) ? one : best);
    hair.setAttribute("visibility", "visible");
    for (const name of ["x1", "x2"]) hair.setAttribute(name, scale.x(at));
    const ended = (s) => at < s.x[0] || at > s.x[s.x.length - 1];
    tip.replaceChildren(el("b", {}, `${whole(at)} images`), ...shown.map((s) => el("div", {},
      el("span", {}, swatch(s.paint), s.label),
      el("b", {}, ended(s) ? "–" : show(s.y[nearest(s.x, at)]) + (this.unit === "%" ? " %" : "")))));
    tip.hidden = false;
    const outer = tip.offsetParent.getBoundingClientRect(), spot = edge.left - outer.left + scale.x(at);
    const side = scale.x(at) + 14 + tip.offsetWidth > edge.width ? -14 - tip.offsetWidth : 14;
    tip.style.left = `${Math.max(0, spot + side)}px`;
    tip.style.top = `${edge.top - outer.top + 8}px`;
  }
}

/** A section of charts that share the extent of their horizontal axis and one smoothing slider. */
function chartsOf(charts, smoothing = () => .9) {
  const every = charts.flatMap(({series}) => series);
  const last = Math.max(1, ...every.map(({x}) => x[x.length - 1]));
  const drawn = charts.map((one) => new Chart(one, last, smoothing));
  return {drawn, node: el("div", {class: "charts"}, ...drawn.map(({node}) => node))};
}

function smoothingSlider(redraw) {
  const slider = el("input", {type: "range", min: 0, max: .98, step: .02, input: redraw});
  slider.value = .9;
  return {value: () => Number(slider.value), node: el("label", {class: "row soft push"}, "smoothing", slider)};
}

function curvesSection(title, charts, after = null) {
  if (!charts.length) return el("section", {}, heading(title), el("p", {class: "soft"}, "Nothing has been logged yet."));
  const slider = smoothingSlider(() => drawn.forEach((one) => one.draw()));
  const {drawn, node} = chartsOf(charts, slider.value);
  return el("section", {}, heading(title, "over images seen", slider.node), node, after);
}
