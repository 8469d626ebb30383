// Unpacks the document and plotly.js, then builds the page. It makes no network request.
"use strict";

async function unpacked(id) {
  const holder = document.getElementById(id);
  const bytes = Uint8Array.from(atob(holder.textContent), (character) => character.charCodeAt(0));
  holder.remove();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function turnsTable(root, { columns, runs }, labels, stages) {
  const ends = [];
  let count = 0;
  for (const run of runs) ends.push((count += run.columns.agent.length));
  const value = (row, key) => {
    const at = ends.findIndex((end) => row < end);
    const run = runs[at];
    return turnValue(run, row - (at ? ends[at - 1] : 0), key, labels);
  };
  const staged = runs.some((run) => run.engines.length > 0);
  const present = columns.filter(({ key }) => key === "run" || (runs.some((run) => run.columns[key]) && (staged || !stages.has(key))));
  return new DataTable(root, "turns", "dualpath ttft>500 round=1", present, count, value);
}

// A fact of a turn as the table shows it: names instead of places, the start in seconds.
function turnValue(run, row, key, labels) {
  if (key === "run") return labels[run.run];
  const value = run.columns[key]?.[row] ?? null;
  if (value === null) return null;
  if (key === "agent") return run.agents[value];
  if (key === "pe" || key === "de") return run.engines[value];
  return key === "start" ? value / 1e3 : value;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// Paper is light and as wide as a page, so everything is redrawn for it, also what has not been in view yet.
function watchTheme(redraw) {
  const root = document.documentElement.dataset;
  document.getElementById("theme").addEventListener("click", () => {
    root.theme = isDark() ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
  let before;
  addEventListener("beforeprint", () => {
    before = root.theme;
    root.theme = "light";
    root.printing = "true";
    redraw(true);
  });
  addEventListener("afterprint", () => {
    delete root.printing;
    if (before) root.theme = before;
    else delete root.theme;
    redraw(true);
  });
}

async function start() {
  const [text, plotly] = await Promise.all([unpacked("packed-document"), unpacked("packed-plotly")]);
  const { sections, runs, turns, stages } = JSON.parse(text);
  const place = Object.fromEntries(runs.columns.map(({ key }, at) => [key, at]));
  new DataTable(document.querySelector("#runs .table"), "runs", "dualpath jct<30", runs.columns, runs.rows.length, (row, key) => runs.rows[row][place[key]]);
  const timeline = turns.runs.length ? new Timeline(document.getElementById("timeline"), turns.runs, runs.labels, stages) : null;
  if (timeline) turnsTable(document.querySelector("#turns .table"), turns, runs.labels, new Set(stages.map(({ name }) => name)));
  const script = document.createElement("script");
  script.textContent = plotly;
  document.head.append(script);
  const charts = new Charts(sections);
  watchTheme((every) => {
    charts.redraw(every);
    timeline?.paint();
  });
  document.getElementById("loading").remove();
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  document.getElementById("loading").textContent = `The charts can't be shown (${error.message}); a browser of 2024 or later is needed.`;
  throw error;
});
