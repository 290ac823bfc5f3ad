// The page of one run.

function summary({finished, tiles, words}) {
  // The address keeps the choice: a page opened from a file has no storage of its own everywhere.
  const live = el("input", {type: "checkbox", change: () => { location.hash = live.checked ? "live" : ""; }});
  live.checked = location.hash === "#live";
  setInterval(() => { if (live.checked) location.reload(); }, 30000);
  return el("section", {style: "margin-top: 0"},
    el("div", {class: "row"}, el("h1", {}, data.title),
      el("span", {class: `pill ${finished ? "good" : "warn"}`}, finished ? "finished" : "not finished"),
      el("span", {class: "soft"}, `${data.run} · ${written()}`),
      el("span", {class: "row push"},
        finished ? null : el("label", {class: "soft"}, live, " reload every 30 s"), theme())),
    el("div", {class: "tiles"}, ...tiles.map(([label, value, unit]) => el("div", {class: "card"},
      el("small", {}, unit ? `${label}, ${unit}` : label), el("b", {class: value.length > 16 ? "long" : null}, value)))),
    words ? el("p", {class: "soft"}, words) : null);
}

function figureCell(value) {
  return value ? [el("b", {}, show(value.value)), el("div", {class: "soft"}, `at ${whole(value.images)} images`)] : "";
}

function figureName(name, better) {
  return [name, better ? el("div", {class: "soft"}, better) : ""];
}

function quality(found) {
  if (!found) return el("section", {}, heading("Quality"), el("p", {class: "soft"},
    "No metrics were measured while training: --metrics.every-kimg 50 measures every 50,000 images while training."));
  const {tables, charts, best} = found;
  const cards = tables.map(({words, rows, span: [first, last, count]}, place) => el("div", {class: "card"},
    el("div", {class: "row"}, el("h3", {}, place ? "By an earlier protocol" : "Figures"),
      el("small", {}, count > 1 ? `${whole(count)} evaluations from ${whole(first)} to ${whole(last)} images`
        : `one evaluation, at ${whole(last)} images`)),
    grid(["", "latest", "best"], rows.map(({name, better, latest, best: top}) =>
      [figureName(name, better), figureCell(latest), figureCell(top)])),
    el("p", {class: "soft"}, "Protocol: ", words, ".")));
  const kept = best ? el("p", {class: "soft"}, "Best checkpoint: ",
    el("b", {}, `${best.metric} ${show(best.value)}`), ` at ${whole(best.images)} images.`) : null;
  return el("section", {}, heading("Quality", "metrics of the samples"), kept,
    el("div", {class: "quality"}, ...cards), charts.length ? chartsOf(charts).node : null);
}

function curves({charts, constants}) {
  const still = constants.map(({key, value}) => `${key} ${show(value)}`).join(", ");
  return curvesSection("Curves", charts, still ? el("p", {class: "soft"}, `Constant throughout: ${still}`) : null);
}

function settings(rows) {
  const groups = new Map();
  for (const [name, value] of rows) {
    const parts = name.split("."), last = parts.pop(), title = parts.join(" ") || "run";
    if (!groups.has(title)) groups.set(title, []);
    groups.get(title).push([last, value]);
  }
  return groups.size ? el("section", {}, heading("Settings"),
    el("div", {class: "tables"}, ...[...groups].map((group) => table(...group)))) : null;
}

function origin(tables) {
  return tables.length ? el("section", {}, heading("Where it ran"),
    el("div", {class: "tables"}, ...tables.map(({title, rows}) => table(title, rows)))) : null;
}

function commands(rows) {
  return el("section", {}, heading("Commands"), el("div", {class: "card"},
    ...rows.flatMap(({label, command}) => [el("small", {}, label), el("code", {}, command)])));
}
