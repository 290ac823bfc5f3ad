// Pictures: the film of samples, and single plates with what they show in words.

function samples({frames, found, reals}) {
  if (!frames.length && !reals) return el("section", {}, heading("Samples"),
    el("p", {class: "soft"}, "No sample has been drawn yet."));
  const film = frames.length ? new Film(frames) : null;
  const note = frames.length < found ? `, ${frames.length} of ${found} grids` : "";
  return el("section", {}, heading("Samples", `from fixed latents${note}`),
    el("div", {class: "pictures"}, film ? film.figure() : null,
      reals ? el("figure", {class: "card"}, el("div", {class: "row"}, el("h3", {}, "Real")),
        el("img", {src: reals, alt: "real images"})) : null),
    frames.length > 1 ? film.strip() : null);
}

/** A large picture, and the strip of all of them with a slider that plays. */
class Film {
  constructor(frames) {
    this.frames = frames;
    this.timer = null;
    this.picture = el("img", {alt: "samples"});
    this.label = el("output", {class: "soft push"});
    this.thumbs = frames.map(({picture, images}, place) => el("button",
      {click: () => this.go(place), title: `${whole(images)} images`, "aria-pressed": "false"},
      el("img", {src: picture, alt: `samples at ${whole(images)} images`})));
    this.row = el("div", {class: "film"}, ...this.thumbs);
    this.slider = el("input", {type: "range", class: "slide", min: 0, max: frames.length - 1,
      "aria-label": "images seen", input: () => this.go(Number(this.slider.value))});
    this.button = el("button", {click: () => this.timer ? this.stop() : this.start()}, "▶ play");
    this.go(frames.length - 1, false);
    new ResizeObserver(() => this.centre()).observe(this.row);
  }

  figure() {
    return el("figure", {class: "card"},
      el("div", {class: "row"}, el("h3", {}, "Generated"), this.label), this.picture);
  }

  strip() {
    return el("div", {class: "card", style: "margin-top: 14px"},
      el("div", {class: "row"}, this.button, this.slider), this.row);
  }

  get place() { return Number(this.slider.value); }

  stop() { clearInterval(this.timer); this.timer = null; this.button.textContent = "▶ play"; }

  start() {
    const last = this.frames.length - 1;
    if (this.place === last) this.go(0);
    this.button.textContent = "❚❚ pause";
    this.timer = setInterval(() => this.place >= last ? this.stop() : this.go(this.place + 1), 350);
  }

  go(place, mark = true) {
    const {picture, images} = this.frames[place];
    this.slider.value = place;
    this.picture.src = picture;
    this.picture.alt = this.label.value = `${whole(images)} images seen`;
    this.slider.setAttribute("aria-valuetext", this.label.value);
    this.thumbs.forEach((thumb, other) => thumb.setAttribute("aria-pressed", String(other === place)));
    this.centre();
    if (mark) markers.forEach((show) => show(images));
  }

  centre() {
    const {offsetLeft, offsetWidth} = this.thumbs[this.place];
    this.row.scrollLeft = offsetLeft - this.row.offsetLeft - (this.row.clientWidth - offsetWidth) / 2;
  }
}

/** Pictures that the run drew of itself, each with what it shows in words. */
function plates(found) {
  if (!found.length) return null;
  return el("div", {class: "plates"}, ...found.map(({title, picture, words, figure}) =>
    el("section", {}, heading(title, figure === null ? "" : `distance ${show(figure)}`),
      el("figure", {class: "card"}, el("img", {src: picture, alt: title}),
        el("figcaption", {class: "soft"}, words)))));
}
