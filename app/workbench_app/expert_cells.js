// The experts of all layers, a row a layer, on a canvas: tens of thousands of cells stay quick.
const VIEWS = new WeakMap();
const LEFT = 58, BOTTOM = 34, NARROWEST = 3, EMPTY = 255;
const WAIT = 160; // ms after the last key before the server hears of it

function array(text, kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new kind(bytes.buffer);
}

const three = (value) => (Number.isFinite(value) ? Number(value.toPrecision(3)).toLocaleString("en") : "–");
const mix = (from, to, at) => from.map((value, i) => Math.round(value + (to[i] - value) * at));
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function line(text, tag = "div") {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

class View {
  constructor(root) {
    this.root = root;
    this.pane = root.querySelector(".pane");
    this.canvas = root.querySelector("canvas");
    this.frame = root.querySelector(".frame");
    this.tip = root.querySelector(".tip");
    this.pane.addEventListener("pointermove", (event) => this.hover(event));
    this.pane.addEventListener("pointerleave", () => this.hide());
    this.pane.addEventListener("click", (event) => {
      const cell = this.cell(event);
      if (cell) this.choose(cell, 0);
    });
    this.pane.addEventListener("keydown", (event) => this.key(event));
    this.observer = new ResizeObserver(() => this.data && this.draw());
    this.observer.observe(root);
  }

  update(data, setTriggerValue) {
    this.setTriggerValue = setTriggerValue;
    this.data = data;
    for (const [name, kind] of [["codes", Uint8Array], ["experts", Int16Array], ["value", Float32Array],
      ["low", Float32Array], ["high", Float32Array], ["count", Float32Array]]) this[name] = array(data[name], kind);
    const stops = data.colours.map(rgb);
    this.palette = Array.from({ length: EMPTY }, (_, code) => {
      const at = (code / (EMPTY - 1)) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
      return `rgb(${mix(stops[low], stops[low + 1], at - low).join(",")})`;
    });
    if (this.sent && String(this.sent) === String(data.chosen)) this.sent = null;
    this.chosen = this.place(...(this.sent ?? data.chosen));
    this.explain();
    this.draw();
  }

  // Row and column of an expert.
  place(layer, expert) {
    const row = this.data.layers.indexOf(layer);
    const cells = this.experts.subarray(row * this.data.columns, (row + 1) * this.data.columns);
    const column = row < 0 ? -1 : cells.indexOf(expert);
    return column < 0 ? null : [row, column];
  }

  explain() {
    const { unit, ticks, colours } = this.data;
    this.root.querySelector(".unit").textContent = unit;
    const bar = this.root.querySelector(".bar");
    bar.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
    bar.replaceChildren(...ticks.map(([at, text]) => {
      const tick = line(text, "span");
      tick.style.left = `${100 * at}%`;
      if (at === 0) tick.className = "first";
      if (at === 1) tick.className = "last";
      return tick;
    }));
  }

  draw() {
    const { layers, columns } = this.data;
    const room = this.root.clientWidth - LEFT - 2;
    if (room <= 0) return;
    this.width = Math.max(NARROWEST, room / Math.max(columns, 1));
    this.height = Math.max(9, Math.min(26, Math.floor(520 / Math.max(layers.length, 1))));
    const width = LEFT + this.width * columns + 2, height = this.height * layers.length + BOTTOM;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const gapX = this.width >= 6 ? 1 : 0, gapY = this.height >= 12 ? 1 : 0;
    for (let row = 0; row < layers.length; row++) {
      for (let column = 0; column < columns; column++) {
        const at = row * columns + column, code = this.codes[at];
        if (this.experts[at] < 0) continue;
        // Whole device pixels, so that no seams show between narrow cells.
        const from = Math.round((LEFT + column * this.width) * scale) / scale;
        const to = Math.round((LEFT + (column + 1) * this.width) * scale) / scale;
        if (code === EMPTY) {
          pen.strokeStyle = "rgba(128,128,128,.35)";
          pen.strokeRect(from + 0.5, row * this.height + 0.5, to - from - gapX - 1, this.height - gapY - 1);
          continue;
        }
        pen.fillStyle = this.palette[code];
        pen.fillRect(from, row * this.height, to - from - gapX, this.height - gapY);
      }
    }
    this.label(pen);
    const { chosen } = this;
    this.frame.style.display = chosen ? "block" : "none";
    if (chosen) {
      Object.assign(this.frame.style, {
        left: `${LEFT + chosen[1] * this.width - 2}px`, top: `${Math.max(chosen[0] * this.height - 2, 0)}px`,
        width: `${Math.max(this.width + 3, 7)}px`, height: `${this.height + 3}px`,
      });
      this.pane.setAttribute("aria-label", `Experts of all layers. Chosen: ${this.named(...chosen)}. ` +
        "Arrow keys choose another.");
    }
    this.root.dataset.geometry = JSON.stringify({ left: LEFT, width: this.width, height: this.height });
  }

  label(pen) {
    const { layers, columns, byValue } = this.data;
    const style = getComputedStyle(this.root);
    pen.font = `11px ${style.fontFamily}`;
    pen.fillStyle = style.color;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const every = Math.ceil(13 / this.height);
    layers.forEach((layer, row) => {
      if (row % every === 0) pen.fillText(row === 0 ? `layer ${layer}` : layer, LEFT - 7, (row + 0.5) * this.height);
    });
    const bottom = this.height * layers.length;
    pen.textBaseline = "top";
    pen.textAlign = "center";
    if (!byValue) {
      const step = [1, 2, 4, 8, 16, 32, 64, 128].find((size) => size * this.width >= 26) ?? 128;
      for (let column = 0; column < columns; column += step)
        pen.fillText(column, LEFT + (column + 0.5) * this.width, bottom + 4);
    }
    pen.textAlign = "left";
    pen.fillText(byValue ? "experts of each layer, largest first" : "expert", LEFT, bottom + (byValue ? 5 : 19));
  }

  named(row, column) {
    return `layer ${this.data.layers[row]}, expert ${this.experts[row * this.data.columns + column]}`;
  }

  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LEFT) / this.width);
    const row = Math.floor((event.clientY - box.top) / this.height);
    const { layers, columns } = this.data;
    if (row < 0 || row >= layers.length || column < 0 || column >= columns) return null;
    return this.experts[row * columns + column] < 0 ? null : [row, column];
  }

  choose(cell, wait) {
    this.chosen = cell;
    this.draw();
    clearTimeout(this.timer);
    const [row, column] = cell;
    const found = [this.data.layers[row], this.experts[row * this.data.columns + column]];
    this.sent = found;
    this.timer = setTimeout(() => this.setTriggerValue("choose", found), wait);
  }

  key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [row, column] = this.chosen ?? [0, -step[1]];
    const to = [row + step[0], column + step[1]];
    const { layers, columns } = this.data;
    if (to[0] < 0 || to[0] >= layers.length || to[1] < 0 || to[1] >= columns) return;
    if (this.experts[to[0] * columns + to[1]] >= 0) this.choose(to, WAIT);
  }

  hover(event) {
    const cell = this.cell(event);
    if (!cell || event.pointerType === "touch") return this.hide();
    const at = cell[0] * this.data.columns + cell[1];
    const known = Number.isFinite(this.value[at]);
    const parts = [line(this.named(...cell), "b")];
    const ends = Number.isFinite(this.low[at]) ? ` [${three(this.low[at])}, ${three(this.high[at])}]` : "";
    parts.push(line(known ? `${three(this.value[at])} ${this.data.unit}${ends}` : "no value"));
    parts.push(line(`from ${this.count[at].toLocaleString("en")}`));
    this.tip.replaceChildren(...parts);
    this.tip.showPopover?.();
    const tip = this.tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - tip.width - 8);
    const below = event.clientY + 16, above = event.clientY - tip.height - 12;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${below + tip.height < innerHeight - 8 ? below : above}px`;
  }

  hide() {
    if (this.tip.matches(":popover-open")) this.tip.hidePopover();
  }
}

export default function ({ parentElement, data, setTriggerValue }) {
  const root = parentElement.querySelector(".cells");
  if (!VIEWS.has(root)) VIEWS.set(root, new View(root));
  const view = VIEWS.get(root);
  view.update(data, setTriggerValue);
  return () => view.hide();
}
