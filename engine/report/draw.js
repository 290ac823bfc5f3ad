// Every key of the data that has a function of its name becomes a section, in this order.
const sections = data.kind === "run"
  ? {summary, events, samples, quality, evaluated, plates, curves, settings, origin, commands}
  : {overview, events, lasts, evaluated, figures, overlays, differing};
const drawn = Object.entries(sections).map(([name, draw]) => draw(data[name]));
document.querySelector("main").replaceChildren(...drawn.filter((section) => section !== null));
