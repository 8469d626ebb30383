// The charts: figures for plotly.js, with the theme's ink and lines, drawn when they come into view.
"use strict";

const PLOT_CONFIG = {
  displaylogo: false,
  responsive: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  toImageButtonOptions: { format: "svg" },
};

// Colours as the browser resolves them: plotly does not know light-dark().
function themeColours() {
  const style = getComputedStyle(document.body);
  return { ink: style.color, paper: style.backgroundColor, line: style.borderTopColor, font: style.fontFamily };
}

function themedAxis(axis, { line }) {
  return { gridcolor: line, zerolinecolor: line, linecolor: line, ...axis };
}

function themedLayout(layout, colours) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: colours.font, color: colours.ink, size: 12 },
    margin: { l: 10, r: 10, t: 28, b: 10 },
    height: 330,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: colours.line, activecolor: colours.ink },
    hoverlabel: { bgcolor: colours.paper, bordercolor: colours.line, font: { color: colours.ink, family: colours.font } },
    bargap: 0.25,
    showlegend: true,
    ...layout,
    xaxis: themedAxis({ showgrid: layout.barmode === "stack" || layout.barmode === undefined, ...layout.xaxis }, colours),
    yaxis: themedAxis({ ...layout.yaxis }, colours),
    shapes: (layout.shapes ?? []).map((shape) => ({ line: { color: colours.ink, width: 1.5, dash: "dash" }, ...shape })),
  };
}

function themedTrace(trace, { ink, paper }) {
  const themed = { ...trace, marker: { ...trace.marker } };
  if (trace.error_y) themed.error_y = { ...trace.error_y, color: ink, thickness: 1.2, width: 4 };
  if (trace.marker?.symbol === "line-ew") themed.marker.line = { ...trace.marker.line, color: ink };
  if (trace.marker?.pattern) themed.marker.pattern = { ...trace.marker.pattern, bgcolor: paper, fillmode: "replace" };
  return themed;
}

// A section of charts, with a choice if it has several options.
class ChartSection {
  constructor(section) {
    this.section = section;
    this.root = document.getElementById(section.id);
    this.option = 0;
    this.select = this.root.querySelector("header select");
    if (this.select) {
      section.options.forEach((name, at) => this.select.add(new Option(name, at)));
      this.select.addEventListener("change", () => {
        this.option = Number(this.select.value);
        this.draw();
      });
    }
    this.drawn = false;
  }

  draw() {
    this.drawn = true;
    for (const chart of this.section.charts) this.drawChart(chart, chart.variants[this.option]);
  }

  drawChart(chart, variant) {
    const figure = document.getElementById(chart.id);
    const plot = figure.querySelector(".plot");
    const details = figure.querySelector("details");
    figure.hidden = chart.variants.every((one) => one === null);
    plot.classList.toggle("none", variant === null);
    details.hidden = variant === null;
    if (variant === null) {
      Plotly.purge(plot);
      plot.textContent = "Not measured here.";
      return;
    }
    if (!plot.querySelector(".plotly")) plot.textContent = "";
    const colours = themeColours();
    const traces = variant.traces.map((trace) => themedTrace(trace, colours));
    Plotly.react(plot, traces, themedLayout(variant.layout, colours), PLOT_CONFIG);
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", `${chart.title}, ${this.section.options[this.option] ?? ""}; its values follow as a table`);
    details.querySelector(".scroll").replaceChildren(plainTable(variant.columns, variant.rows));
  }
}

class Charts {
  constructor(sections) {
    this.sections = sections.map((section) => new ChartSection(section));
    const watcher = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) {
        const section = this.sections.find(({ root }) => root === target);
        if (isIntersecting && !section.drawn) section.draw();
      }
    }, { rootMargin: "500px" });
    this.sections.forEach(({ root }) => watcher.observe(root));
  }

  // Redraws the charts that have been seen in the theme's colours; or all from scratch, which also measures their room.
  redraw(every = false) {
    if (every) for (const plot of document.querySelectorAll(".plot")) Plotly.purge(plot);
    for (const section of this.sections) if (section.drawn || every) section.draw();
  }
}
