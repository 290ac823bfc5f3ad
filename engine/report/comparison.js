// The page of several runs: one colour per run, the same everywhere.

function runName(place) {
  return [swatch(`var(--c${place % PAINTS})`), data.names[place]];
}

function overview(rows) {
  const heads = ["run", "state", "images", "trained for", "images/s, recent median", "peak memory, GiB", "device", "torch"];
  return el("section", {style: "margin-top: 0"},
    el("div", {class: "row"}, el("h1", {}, data.title), el("span", {class: "soft"}, written()),
      el("span", {class: "push"}, theme())),
    el("div", {class: "card"}, grid(heads, rows.map((row, place) => [runName(place), ...row]))));
}

function lasts(found) {
  return el("section", {}, heading("Samples", "the newest grid of each run"),
    el("div", {class: "pictures"}, ...found.map((last, place) => el("figure", {class: "card"},
      el("div", {class: "row"}, el("h3", {}, ...runName(place)),
        el("span", {class: "soft push"}, last ? `${whole(last.images)} images` : "none yet")),
      last ? el("img", {src: last.picture, alt: `samples of ${data.names[place]}`}) : null))));
}

function figures({tables, differ}) {
  if (!tables.length) return el("section", {}, heading("Quality"),
    el("p", {class: "soft"}, "None of these runs has measured metrics while training."));
  const alone = tables.length > 1;
  const why = alone ? el("div", {class: "card"},
    el("p", {class: "warn"}, "These runs were measured by different protocols, so their figures do not ",
      "compare and stand apart. The protocols differ in:"),
    grid(["", ...tables.map((_, place) => `protocol ${place + 1}`)], differ)) : null;
  const cards = tables.map(({runs, words, rows}, place) => el("div", {class: "card"},
    el("h3", {}, alone ? `Protocol ${place + 1}` : "Figures"),
    grid(["", ...runs.map(runName)], rows.map(({name, better, cells}) =>
      [figureName(name, better), ...cells.map(figurePair)])),
    el("p", {class: "soft"}, "Protocol: ", words, ".")));
  return el("section", {}, heading("Quality", "latest figures, and the best of each run"), why,
    el("div", {class: "quality"}, ...cards));
}

function figurePair(cell) {
  if (!cell) return "";
  const {latest, best} = cell;
  return [...figureCell(latest), best && best.images !== latest.images
    ? el("div", {class: "soft"}, `best ${show(best.value)} at ${whole(best.images)} images`) : ""];
}

function overlays(charts) {
  for (const {series} of charts) for (const s of series) s.label = data.names[s.run];
  return curvesSection("Curves", charts);
}

function differing({rows, same}) {
  const rest = `${whole(same)} settings are the same in all of them.`;
  return el("section", {}, heading("Settings that differ"), el("div", {class: "card"},
    rows.length ? grid(["", ...data.names.map((_, place) => runName(place))], rows) : null,
    el("p", {class: "soft"}, rows.length ? rest : `None: ${rest}`)));
}
