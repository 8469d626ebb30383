// The timeline on its canvas: drawing, pointing, keys. TimelineView knows what is in view.
"use strict";

const AXIS_HEIGHT = 26;
const KEY_MOVES = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] };

class Timeline {
  constructor(root, runs, labels, stages) {
    Object.assign(this, { root, runs, labels, stages, selected: null, queued: false });
    this.canvas = root.querySelector("canvas");
    this.tip = root.querySelector(".tip");
    this.facts = root.querySelector("#turn-facts");
    this.runChoice = root.querySelector("#timeline-run");
    this.laneChoice = root.querySelector("#timeline-lanes");
    runs.forEach((run, at) => this.runChoice.add(new Option(labels[run.run], at)));
    root.querySelector(".legend").replaceChildren(...stages.map((stage) => this.legend(stage)));
    this.listen();
    this.choose();
  }

  legend({ name, colour, meaning }) {
    const item = element("li");
    const chip = element("i");
    chip.style.background = colour;
    item.append(chip, name);
    item.title = meaning;
    return item;
  }

  listen() {
    this.runChoice.addEventListener("change", () => this.choose());
    this.laneChoice.addEventListener("change", () => this.choose());
    for (const button of this.root.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => this.change((view) => this.zoomBy(view, button.dataset.zoom)));
    }
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("pointerdown", (event) => this.grab(event));
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointerleave", () => (this.tip.hidden = true));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  zoomBy(view, way) {
    if (way === "all") view.all();
    else view.zoom(way === "in" ? 0.6 : 1 / 0.6);
  }

  // Shows the chosen run in the chosen lanes.
  choose() {
    const run = this.runs[this.runChoice.value || 0];
    const engines = this.laneChoice.querySelector('[value="engine"]');
    engines.disabled = run.engines.length === 0;
    if (engines.disabled) this.laneChoice.value = "agent";
    this.view = new TimelineView(run, this.stages, this.laneChoice.value);
    this.selected = null;
    this.canvas.style.height = `${this.view.height + AXIS_HEIGHT}px`;
    const turns = run.columns.agent.length;
    const text = `Timeline of ${this.labels[run.run]}: ${turns} turns of ${run.agents.length} agents in ${(this.view.end / 1e3).toFixed(1)} s`;
    this.canvas.setAttribute("aria-label", text);
    this.draw();
  }

  change(action) {
    action(this.view);
    this.tip.hidden = true;
    this.draw();
  }

  draw() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      this.paint();
    });
  }

  paint() {
    const { canvas, view } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = view.height + AXIS_HEIGHT;
    if (!width) return;
    canvas.width = width * scale;
    canvas.height = height * scale;
    this.gutter = width < 560 ? 48 : 96;
    this.colours = themeColours();
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = `11px ${this.colours.font}`;
    this.paintAxis(context, width, height);
    const first = Math.floor(view.scroll / view.laneHeight);
    const last = Math.min(view.lanes.length, Math.ceil((view.scroll + view.height) / view.laneHeight));
    context.save();
    context.beginPath();
    context.rect(0, AXIS_HEIGHT, width, view.height);
    context.clip();
    for (let lane = first; lane < last; lane++) this.paintLane(context, lane, width);
    context.restore();
    this.paintScrollbar(context, width);
  }

  paintScrollbar(context, width) {
    const { view } = this;
    if (!view.scrolls) return;
    const share = view.height / (view.lanes.length * view.laneHeight);
    context.fillStyle = this.colours.ink;
    context.globalAlpha = 0.35;
    context.fillRect(width - 6, AXIS_HEIGHT + view.scroll * share, 4, Math.max(view.height * share, 12));
    context.globalAlpha = 1;
  }

  x(time, width) {
    return this.gutter + ((time - this.view.from) / (this.view.to - this.view.from)) * (width - this.gutter - 8);
  }

  paintAxis(context, width, height) {
    const { view, colours } = this;
    const rough = ((view.to - view.from) / (width - this.gutter)) * 90;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5].find((part) => part * power >= rough) ?? 10);
    const digits = Math.max(0, Math.ceil(-Math.log10(step / 1e3)));
    context.strokeStyle = colours.line;
    context.fillStyle = colours.ink;
    context.textAlign = "center";
    for (let at = Math.ceil(view.from / step) * step; at <= view.to; at += step) {
      const x = Math.round(this.x(at, width)) + 0.5;
      context.beginPath();
      context.moveTo(x, AXIS_HEIGHT - 6);
      context.lineTo(x, height);
      context.stroke();
      context.fillText(`${(at / 1e3).toFixed(digits)} s`, x, 14);
    }
  }

  paintLane(context, at, width) {
    const { view, colours } = this;
    const lane = view.lanes[at];
    const top = AXIS_HEIGHT + at * view.laneHeight - view.scroll;
    const gap = view.laneHeight > 12 ? 4 : 1;
    for (const span of lane.spans) {
      if (span.to < view.from || span.from > view.to) continue;
      this.paintSpan(context, span, top + gap / 2, view.laneHeight - gap, width);
    }
    if (lane.label && (view.laneHeight >= 11 || at % Math.ceil(11 / view.laneHeight) === 0 || view.run.engines.includes(lane.label))) {
      context.fillStyle = colours.paper;
      context.fillRect(0, top, this.gutter - 4, Math.max(view.laneHeight, 11));
      context.fillStyle = colours.ink;
      context.textAlign = "right";
      context.fillText(this.clipped(lane.label), this.gutter - 8, top + view.laneHeight / 2 + 4);
    }
  }

  clipped(label) {
    const most = this.gutter < 60 ? 6 : 13;
    return label.length > most ? `…${label.slice(1 - most)}` : label;
  }

  // A span takes at least a pixel, so that no turn is lost; a stage too narrow to see gives way to the next.
  paintSpan(context, { turn, first, edges }, top, height, width) {
    const left = Math.max(this.x(edges[0], width), this.gutter);
    let x = left;
    for (let part = 1; part < edges.length; part++) {
      const end = Math.min(this.x(edges[part], width), width);
      if (end - x < 0.4 && part < edges.length - 1) continue;
      if (end <= this.gutter || end <= x) continue;
      context.fillStyle = this.stages[first + part - 1].colour;
      context.fillRect(x, top, Math.max(end - x, 0.6), height);
      x = end;
    }
    if (x === left && x < width) {
      context.fillStyle = this.stages[first].colour;
      context.fillRect(x, top, 1, height);
    }
    if (turn === this.selected) {
      context.strokeStyle = this.colours.ink;
      context.lineWidth = 2;
      context.strokeRect(left - 1, top - 1, Math.max(x - left, 1) + 2, height + 2);
      context.lineWidth = 1;
    }
  }

  // Returns the pointer's time, its height within the lanes, and the turn there.
  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const { view } = this;
    const share = (event.clientX - box.left - this.gutter) / (box.width - this.gutter - 8);
    const time = view.from + share * (view.to - view.from);
    const y = event.clientY - box.top - AXIS_HEIGHT;
    const slack = (3 / box.width) * (view.to - view.from);
    return { box, share, turn: y < 0 || share < 0 ? null : view.turnAt(time, y, slack) };
  }

  wheel(event) {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.change((view) => view.zoom(event.deltaY > 0 ? 1.25 : 0.8, Math.min(Math.max(this.under(event).share, 0), 1)));
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      this.change((view) => view.move((event.deltaX || event.deltaY) / 1000, 0));
    } else if (this.view.scrolls) {
      const before = this.view.scroll;
      this.change((view) => view.move(0, event.deltaY));
      if (this.view.scroll !== before) event.preventDefault();
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = KEY_MOVES[event.key];
    const key = event.key.toLowerCase();
    if (move) this.change((view) => view.move(...move));
    else if (key === "+" || key === "=") this.change((view) => view.zoom(0.6));
    else if (key === "-") this.change((view) => view.zoom(1 / 0.6));
    else if (key === "0") this.change((view) => view.all());
    else if (key === "n" || key === "p") this.step(key === "n" ? 1 : -1);
    else return;
    event.preventDefault();
  }

  step(by) {
    const count = this.view.run.columns.agent.length;
    this.pick(this.selected === null ? (by > 0 ? 0 : count - 1) : (this.selected + by + count) % count);
    this.view.reveal(this.selected);
    this.draw();
  }

  pick(turn) {
    this.selected = turn;
    this.facts.textContent = turn === null ? "" : this.described(turn).join(" · ");
    this.draw();
  }

  grab(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.held = { x: event.clientX, y: event.clientY, moved: 0 };
  }

  point(event) {
    if (this.held) {
      const { box } = this.under(event);
      const [x, y] = [this.held.x - event.clientX, this.held.y - event.clientY];
      this.held = { x: event.clientX, y: event.clientY, moved: this.held.moved + Math.abs(x) + Math.abs(y) };
      if (this.held.moved > 4) this.change((view) => view.move(x / (box.width - this.gutter), y));
      return;
    }
    const { turn, box } = this.under(event);
    this.tip.hidden = turn === null;
    if (turn === null) return;
    this.tip.replaceChildren(...this.described(turn).map((text) => Object.assign(element("div"), { textContent: text })));
    const x = event.clientX - box.left;
    this.tip.style.left = `${Math.min(x + 14, Math.max(0, box.width - this.tip.offsetWidth - 8))}px`;
    const y = event.clientY - box.top + 14;
    this.tip.style.top = `${Math.max(0, Math.min(y, box.height - this.tip.offsetHeight - 4))}px`;
  }

  release(event) {
    const moved = this.held?.moved ?? 0;
    this.held = null;
    if (moved <= 4) this.pick(this.under(event).turn);
  }

  // A turn's facts, a line each.
  described(turn) {
    const { columns, agents, engines } = this.view.run;
    const seconds = (ms) => (ms === null ? "–" : ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1e3).toFixed(2)} s`);
    const of = (key) => columns[key][turn];
    const lines = [
      `${agents[of("agent")]}, round ${of("round")}, from ${(of("start") / 1e3).toFixed(2)} s`,
      `TTFT ${seconds(of("ttft"))}, latency ${seconds(of("latency"))}, ${seconds(of("tpot"))} a token`,
      `${of("prompt").toLocaleString("en")} prompt tokens, ${of("loaded").toLocaleString("en")} loaded, ${of("generated").toLocaleString("en")} generated`,
      this.stages.filter(({ name }) => of(name) > 0).map(({ name }) => `${name} ${seconds(of(name))}`).join(", "),
    ];
    if (columns.pe && of("pe") !== null) {
      const read = ["pe", "de"].map((side) => `${engines[of(side)]} read ${of(`${side}_read`).toLocaleString("en")} tokens`);
      lines.push(`${read.join(", ")}${of("attempts") > 1 ? `, ${of("attempts")} attempts` : ""}`);
    }
    if (of("tries") > 1) lines.push(`${of("tries")} tries`);
    return lines;
  }
}
