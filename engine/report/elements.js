"use strict";
// Elements, numbers in words, and what both pages share.
const data = JSON.parse(document.getElementById("data").textContent);
const svgSpace = document.getElementById("svg").namespaceURI;
const PAINTS = 6;  // colours of the style sheet

function el(tag, attributes = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS(svgSpace, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A number for people: four digits, thousands with commas, tiny and huge ones with an exponent. */
function show(value) {
  if (value === null || value === undefined) return "not finite";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return String(Number(value.toPrecision(4)).toExponential());
  return value.toLocaleString("en", {maximumSignificantDigits: size >= 1e4 ? 7 : 4, maximumFractionDigits: 6});
}
const short = (value) => value.toLocaleString("en", {notation: "compact", maximumSignificantDigits: 4});
const whole = (value) => value.toLocaleString("en");

function heading(title, note, ...controls) {
  return el("div", {class: "row"}, el("h2", {}, title),
    note ? el("span", {class: "soft"}, note) : null, ...controls);
}

function swatch(paint) {
  return el("span", {class: "swatch", style: `background: ${paint}`});
}

function written() {
  const minutes = (Date.now() / 1000 - data.written) / 60;
  const ago = minutes < 1 ? "just now" : minutes < 100 ? `${Math.round(minutes)} min ago`
    : minutes < 2900 ? `${Math.round(minutes / 60)} h ago` : `${whole(Math.round(minutes / 1440))} days ago`;
  return `page written ${ago}`;
}

function theme() {
  const dark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
  return el("button", {click: () => {
    document.documentElement.style.colorScheme = dark() ? "light" : "dark";
  }}, "light / dark");
}

function table(title, rows) {
  return el("div", {class: "card"}, el("h3", {}, title), el("table", {class: "pairs"}, el("tbody", {},
    ...rows.map(([name, value, reason]) => el("tr", {}, el("td", {}, name),
      el("td", {}, value, reason ? el("div", {class: "soft"}, reason) : ""))))));
}

/** A table with column heads; a wide one scrolls inside its card. */
function grid(heads, rows) {
  const cell = (tag) => (content) => el(tag, {}, ...[content].flat());
  return el("div", {class: "wide"}, el("table", {class: "grid"},
    el("thead", {}, el("tr", {}, ...heads.map(cell("th")))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell("td")))))));
}

/** What engine.evaluate measured: a table per protocol, a row per run and checkpoint. */
function evaluated(tables) {
  if (!tables.length) return null;
  const name = (place) => data.kind === "run" ? data.run : runName(place);
  const cards = tables.map(({heads, rows, words}) => el("div", {class: "card"},
    grid(["run", "checkpoint", ...heads.map((head) => figureName(...head))],
      rows.map(([place, images, digest, values]) => [name(place),
        [`${whole(images)} images`, el("div", {class: "soft"}, digest)], ...values.map((cell) => cell.map(show))])),
    el("p", {class: "soft"}, "Protocol: ", words, ".")));
  const apart = tables.length > 1 ? "one table per protocol; their figures do not compare" : "after training";
  return el("section", {}, heading("Measured by engine.evaluate", apart), ...cards);
}

function events(list) {
  if (!list.length) return null;
  const tone = {warning: "warn", note: "warn", rollback: "warn", nan: "bad", finish: "good"};
  const line = ({kind, images, text}) => el("li", {},
    el("b", {class: tone[kind] || "soft"}, kind), " ",
    images === null ? "" : el("span", {class: "soft"}, `at ${whole(images)} images `), text);
  const loud = list.filter(({kind}) => tone[kind] && kind !== "finish");
  const quiet = list.filter(({kind}) => !tone[kind] || kind === "finish");
  const fold = (rows) => rows.length ? el("details", {},
    el("summary", {class: "soft"}, `${rows.length} more`), el("ul", {}, ...rows.map(line))) : null;
  return el("section", {}, heading(loud.length ? "Warnings and events" : "Events"),
    el("div", {class: "card"}, el("ul", {}, ...loud.slice(0, 6).map(line)), fold(loud.slice(6)),
      fold(quiet.slice(0, -4)), el("ul", {}, ...quiet.slice(-4).map(line))));
}
