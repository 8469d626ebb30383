// What the timeline shows of a run: spans in lanes, and the stretch of time and lanes in view. Times in milliseconds.
"use strict";

const MOST_HEIGHT = 560;
const LANE_HEIGHT = { most: 24, least: 7 };

class TimelineView {
  // A lane for each agent, or for each engine as many as it has turns at once: a prefill engine's turns until their
  // first token, a decode engine's from there.
  constructor(run, stages, by) {
    this.run = run;
    this.stages = stages;
    this.lanes = [];
    if (by === "engine") this.byEngine();
    else this.byAgent();
    const { start, latency } = run.columns;
    this.end = start.reduce((most, at, turn) => Math.max(most, at + latency[turn]), 0) || 1;
    this.laneHeight = Math.min(LANE_HEIGHT.most, Math.max(LANE_HEIGHT.least, Math.floor(MOST_HEIGHT / this.lanes.length)));
    this.height = Math.min(MOST_HEIGHT, this.lanes.length * this.laneHeight);
    this.all();
  }

  byAgent() {
    const { run } = this;
    const last = this.stages.length;
    this.lanes = run.agents.map((label) => ({ label, spans: [] }));
    run.columns.agent.forEach((agent, turn) => this.lanes[agent].spans.push(this.span(turn, 0, last)));
  }

  byEngine() {
    const { columns, engines } = this.run;
    const decode = this.stages.length - 1;
    const spans = engines.map(() => []);
    columns.agent.forEach((_, turn) => {
      if (columns.pe[turn] === null) return;
      spans[columns.pe[turn]].push(this.span(turn, 0, decode));
      spans[columns.de[turn]].push(this.span(turn, decode, decode + 1));
    });
    spans.forEach((own, engine) => this.packed(engines[engine], own));
  }

  // Puts each span into its engine's first free lane.
  packed(label, spans) {
    const lanes = [{ label, spans: [] }];
    const free = [-Infinity];
    for (const span of spans.sort((a, b) => a.from - b.from)) {
      let lane = free.findIndex((at) => at <= span.from);
      if (lane < 0) lane = lanes.push({ label: "", spans: [] }) - 1;
      lanes[lane].spans.push(span);
      free[lane] = span.to;
    }
    this.lanes.push(...lanes);
  }

  // Returns where a turn's stages from `first` up to `last` begin and end.
  span(turn, first, last) {
    const { columns } = this.run;
    const edges = [columns.start[turn]];
    for (const { name } of this.stages) edges.push(edges.at(-1) + columns[name][turn]);
    return { turn, first, edges: edges.slice(first, last + 1), from: edges[first], to: edges[last] };
  }

  all() {
    this.from = 0;
    this.to = this.end * 1.005;
    this.scroll = 0;
  }

  // Zooms around the point at `share` of the view.
  zoom(factor, share = 0.5) {
    const width = Math.min(Math.max((this.to - this.from) * factor, 1), this.end * 1.005);
    const fixed = this.from + share * (this.to - this.from);
    this.from = fixed - share * width;
    this.to = this.from + width;
    this.move(0, 0);
  }

  // Moves by a share of the view in time, and by pixels of lanes.
  move(share, pixels) {
    const width = this.to - this.from;
    this.from = Math.min(Math.max(this.from + share * width, 0), Math.max(0, this.end * 1.005 - width));
    this.to = this.from + width;
    const most = Math.max(0, this.lanes.length * this.laneHeight - this.height);
    this.scroll = Math.min(Math.max(this.scroll + pixels, 0), most);
  }

  get scrolls() {
    return this.lanes.length * this.laneHeight > this.height;
  }

  // Returns the turn at a time and a height within the lanes, or null.
  turnAt(time, y, slack) {
    const lane = this.lanes[Math.floor((y + this.scroll) / this.laneHeight)];
    const found = lane?.spans.find(({ from, to }) => from - slack <= time && time <= to + slack);
    return found ? found.turn : null;
  }

  // Brings a turn into view.
  reveal(turn) {
    const { start, latency } = this.run.columns;
    if (start[turn] < this.from || start[turn] + latency[turn] > this.to) {
      this.move((start[turn] - this.from) / (this.to - this.from) - 0.2, 0);
    }
    const lane = this.lanes.findIndex(({ spans }) => spans.some((span) => span.turn === turn));
    const y = lane * this.laneHeight - this.scroll;
    if (y < 0 || y > this.height - this.laneHeight) this.move(0, y - this.height / 2);
  }
}
