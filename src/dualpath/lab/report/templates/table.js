// A table that sorts by a click on a heading, filters by words and comparisons, and shows a page of rows at a time.
"use strict";

const PAGE_ROWS = 50;
const COMPARISON = /^(\w+)(<=|>=|<|>|=)(.+)$/;
const COMPARE = {
  "<": (a, b) => a < b,
  ">": (a, b) => a > b,
  "<=": (a, b) => a <= b,
  ">=": (a, b) => a >= b,
};

function formatted(value, column) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const digits = column.digits ?? 0;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// The values of a chart: a plain table.
function plainTable(columns, rows) {
  const table = document.createElement("table");
  const text = columns.map((_, at) => rows.some((row) => typeof row[at] === "string"));
  const head = table.createTHead().insertRow();
  columns.forEach((name, at) => {
    const cell = document.createElement("th");
    cell.textContent = name;
    cell.scope = "col";
    cell.classList.toggle("text", text[at]);
    head.append(cell);
  });
  const body = table.createTBody();
  for (const values of rows) {
    const row = body.insertRow();
    values.forEach((value, at) => {
      const cell = row.insertCell();
      cell.textContent = value ?? "–";
      cell.classList.toggle("text", text[at]);
    });
  }
  return table;
}

class DataTable {
  // `example` shows a filter; `value(row, key)` returns a cell's value; rows are numbered from 0 up to `count`.
  constructor(root, name, example, columns, count, value) {
    Object.assign(this, { name, example, columns, count, value, page: 0, sorted: null, descending: false });
    this.rows = Array.from({ length: count }, (_, row) => row);
    this.build(root);
    this.show();
  }

  build(root) {
    const tools = element("div", "tools");
    this.input = element("input");
    this.input.type = "search";
    this.input.placeholder = `such as: ${this.example}`;
    this.input.setAttribute("aria-label", `Filter the ${this.name}`);
    this.input.title = `Columns to compare: ${this.columns.map((column) => column.key).join(", ")}`;
    this.input.addEventListener("input", () => this.filter());
    this.status = element("span");
    this.status.setAttribute("role", "status");
    this.back = this.pager("Previous", -1);
    this.next = this.pager("Next", 1);
    tools.append(this.input, this.status, this.back, this.next);
    const table = element("table");
    table.setAttribute("aria-label", this.name);
    const head = table.createTHead().insertRow();
    this.heads = this.columns.map((column) => {
      const cell = element("th", column.digits === null ? "text" : "");
      cell.scope = "col";
      cell.dataset.key = column.key;
      const button = element("button");
      button.type = "button";
      button.textContent = column.label;
      button.addEventListener("click", () => this.sort(column));
      cell.append(button);
      head.append(cell);
      return cell;
    });
    this.body = table.createTBody();
    const scroll = element("div", "scroll");
    scroll.append(table);
    root.append(tools, scroll);
  }

  pager(label, step) {
    const button = element("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", () => {
      this.page += step;
      this.show();
    });
    return button;
  }

  // Numbers begin with the largest, text with A; another click reverses the order. Missing values come last.
  sort(column) {
    this.descending = this.sorted === column ? !this.descending : column.digits !== null;
    this.sorted = column;
    this.order();
    this.page = 0;
    this.show();
  }

  order() {
    if (this.sorted === null) return;
    const { key } = this.sorted;
    const keys = new Map(this.rows.map((row) => [row, this.value(row, key) ?? null]));
    const sign = this.descending ? -1 : 1;
    const text = new Intl.Collator("en", { numeric: true });
    this.rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      const order = typeof x === "number" ? x - y : text.compare(x, y);
      return sign * order || a - b;
    });
  }

  filter() {
    const tests = this.input.value.trim().split(/\s+/).filter(Boolean).map((term) => this.test(term));
    const wrong = tests.includes(null);
    this.input.setAttribute("aria-invalid", String(wrong));
    if (!wrong) {
      this.rows = [];
      for (let row = 0; row < this.count; row++) if (tests.every((test) => test(row))) this.rows.push(row);
      this.order();
    }
    this.page = 0;
    this.show();
  }

  // Turns a term into a test of a row; null if it compares an unknown column.
  test(term) {
    const found = COMPARISON.exec(term);
    if (found === null) {
      const word = term.toLowerCase();
      const texts = this.columns.filter((column) => column.digits === null);
      return (row) => texts.some(({ key }) => String(this.value(row, key) ?? "").toLowerCase().includes(word));
    }
    const [, key, operator, right] = found;
    const column = this.columns.find((one) => one.key === key.toLowerCase());
    if (column === undefined) return null;
    if (operator === "=") return (row) => String(this.value(row, column.key) ?? "–").toLowerCase() === right.toLowerCase();
    const bound = Number(right);
    if (Number.isNaN(bound)) return null;
    return (row) => {
      const value = this.value(row, column.key);
      return typeof value === "number" && COMPARE[operator](value, bound);
    };
  }

  show() {
    const pages = Math.max(1, Math.ceil(this.rows.length / PAGE_ROWS));
    this.page = Math.min(Math.max(this.page, 0), pages - 1);
    const shown = this.rows.slice(this.page * PAGE_ROWS, (this.page + 1) * PAGE_ROWS);
    this.body.replaceChildren(...shown.map((row) => this.line(row)));
    this.heads.forEach((cell, at) => {
      const own = this.columns[at] === this.sorted;
      if (own) cell.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    const wrong = this.input.getAttribute("aria-invalid") === "true";
    const found = `${this.rows.length.toLocaleString("en")} ${this.name}`;
    this.status.textContent = wrong
      ? `no such comparison; columns: ${this.columns.map((column) => column.key).join(", ")}`
      : pages > 1 ? `${found}, page ${this.page + 1} of ${pages}` : found;
    this.back.hidden = this.next.hidden = pages === 1;
    this.back.disabled = this.page === 0;
    this.next.disabled = this.page === pages - 1;
  }

  line(row) {
    const line = element("tr");
    for (const column of this.columns) {
      const cell = line.insertCell();
      cell.textContent = formatted(this.value(row, column.key), column);
      if (column.digits === null) cell.className = "text";
    }
    return line;
  }
}

function element(name, classes = "") {
  const made = document.createElement(name);
  if (classes) made.className = classes;
  return made;
}
