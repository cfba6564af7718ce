// The tokens of a text, coloured. Text from data is only ever put into textContent; numbers come as base64 arrays and
// become the table of a token when its tooltip is shown.
const VIEWS = new WeakMap();
const WAIT = 120; // ms after the last key before the server hears of the pinned token
const ROWS = 24; // layers in one table of the tooltip
const RANKS = 8; // experts in one row of it

function array(text, kind) {
  if (!text) return null;
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new kind(bytes.buffer);
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

class View {
  constructor(root) {
    this.root = root;
    this.legend = root.querySelector(".legend");
    this.pane = root.querySelector(".pane");
    this.tip = root.querySelector(".tip");
    this.colours = root.querySelector("style.colours");
    this.spans = [];
    this.sent = undefined; // a pin that the server hasn't answered yet
    this.known = undefined; // the pin it told last
    this.pane.addEventListener("pointerover", (event) => this.hover(event));
    this.pane.addEventListener("pointerleave", () => this.hide());
    this.pane.addEventListener("scroll", () => this.hide(), { passive: true });
    this.pane.addEventListener("click", (event) => {
      const at = this.place(event.target);
      if (at !== null) this.choose(at === this.pin ? null : at, 0);
    });
    this.pane.addEventListener("keydown", (event) => this.key(event));
  }

  place(target) {
    const span = target.closest?.(".t");
    return span ? this.data.start + span.at : null;
  }

  update(data, send) {
    this.send = send;
    const fresh = !this.data || this.data.key !== data.key;
    this.data = data;
    if (fresh) {
      this.hide();
      this.experts = array(data.experts, Uint16Array);
      this.weights = array(data.weights, Float32Array);
      this.entropy = array(data.entropy, Float32Array);
      this.margin = array(data.margin, Float32Array);
      this.nll = array(data.nll, Float32Array);
      this.write();
    }
    this.paint();
    if (this.sent !== undefined && data.pin === this.sent) this.sent = undefined;
    if (fresh || (this.sent === undefined && data.pin !== this.known)) {
      this.mark(data.pin, data.pin !== null && data.pin !== this.pin);
    }
    this.known = data.pin;
  }

  // One inline element a token, a block a line; a line out of sight costs nothing (content-visibility).
  write() {
    const { data } = this;
    const begins = new Map(data.begins);
    const pieces = new Set(data.pieces), unknown = new Set(data.unknown);
    const lines = document.createDocumentFragment();
    let line = null;
    this.spans = data.texts.map((text, at) => {
      if (begins.has(at)) {
        lines.append(make("span", "begin", begins.get(at)));
        line = null;
      }
      if (line === null) {
        line = make("div", "line");
        line.dir = "auto";
        lines.append(line);
      }
      const ends = text.endsWith("\n");
      const span = make("span", "t", ends ? text.slice(0, -1) : text);
      span.at = at;
      span.id = `t${data.start + at}`;
      span.setAttribute("role", "option");
      if (pieces.has(at)) span.classList.add("piece");
      if (unknown.has(at)) span.classList.add("unknown");
      if (data.phases) span.classList.add(data.phases[at]);
      line.append(span);
      if (ends) line = null;
      return span;
    });
    this.pane.replaceChildren(lines);
    this.pane.scrollTop = 0;
    this.pin = null;
  }

  paint() {
    const { data } = this;
    const codes = array(data.codes, Int16Array);
    const rules = data.light.background.map((light, code) => {
      const ground = `light-dark(${light}, ${data.dark.background[code]})`;
      const ink = `light-dark(${data.light.ink[code]}, ${data.dark.ink[code]})`;
      return `.c${code} { background: ${ground}; color: ${ink}; }`;
    });
    this.colours.textContent = rules.join("\n");
    this.root.classList.toggle("numbered", Boolean(data.numbers));
    this.spans.forEach((span, at) => {
      const code = codes[at];
      for (const name of [...span.classList]) if (/^c\d+$/.test(name)) span.classList.remove(name);
      span.classList.toggle("none", code < 0);
      if (code >= 0) span.classList.add(`c${code}`);
      span.classList.toggle("dim", data.only !== null && data.experts_shown[at] !== data.only);
      if (data.numbers) span.dataset.n = data.numbers[at];
      else delete span.dataset.n;
    });
    this.explain();
  }

  explain() {
    const { legend, title } = this.data;
    const parts = [make("span", "title", title)];
    if (legend.experts) {
      for (const [expert, code, count] of legend.experts) {
        const button = make("button", `c${code}`, `${expert} `);
        button.type = "button";
        button.title = `Expert ${expert}: ${count} tokens of this text. Click to put it forward.`;
        button.setAttribute("aria-pressed", String(this.data.only === expert));
        button.append(make("small", "", `×${count}`));
        button.onclick = () => this.send("only", { at: this.data.only === expert ? null : expert });
        parts.push(button);
      }
      if (legend.more) parts.push(make("span", "", `and ${legend.more} more`));
    } else {
      const bar = make("span", "bar");
      const stops = this.data.light.background.map(
        (light, code) => `light-dark(${light}, ${this.data.dark.background[code]})`,
      );
      bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
      parts.push(make("span", "", legend.low), bar, make("span", "", legend.high));
    }
    if (legend.none) parts.push(make("span", "", `not coloured: ${legend.none}`));
    this.legend.replaceChildren(...parts);
  }

  // --- the pinned token

  mark(at, scroll) {
    const { start } = this.data;
    const before = this.spans[this.pin - start];
    before?.classList.remove("pin");
    before?.removeAttribute("aria-selected");
    this.pin = at;
    const span = at === null ? undefined : this.spans[at - start];
    span?.classList.add("pin");
    span?.setAttribute("aria-selected", "true");
    if (span) this.pane.setAttribute("aria-activedescendant", span.id);
    else this.pane.removeAttribute("aria-activedescendant");
    if (span && scroll) this.reveal(span);
  }

  reveal(span) {
    const box = span.getBoundingClientRect(), pane = this.pane.getBoundingClientRect();
    if (box.top < pane.top + 8) this.pane.scrollTop -= pane.top + 8 - box.top;
    else if (box.bottom > pane.bottom - 8) this.pane.scrollTop += box.bottom - pane.bottom + 8;
  }

  choose(at, wait) {
    this.hide();
    this.mark(at, true);
    this.sent = at;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.send("pin", { at }), wait);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const { start, total } = this.data;
    const at = this.pin ?? null;
    const to = (place) => Math.min(Math.max(place, 0), total - 1);
    const forward = getComputedStyle(this.spans[(at ?? start) - start]?.parentElement ?? this.pane).direction !== "rtl";
    let next;
    if (event.key === "Escape") next = null;
    else if (event.key === "ArrowRight") next = at === null ? start : to(at + (forward ? 1 : -1));
    else if (event.key === "ArrowLeft") next = at === null ? start : to(at + (forward ? -1 : 1));
    else if (event.key === "ArrowDown") next = at === null ? start : this.vertical(at, 1);
    else if (event.key === "ArrowUp") next = at === null ? start : this.vertical(at, -1);
    else if (event.key === "Home") next = start;
    else if (event.key === "End") next = start + this.spans.length - 1;
    else return;
    event.preventDefault();
    event.stopPropagation();
    if (next !== at) this.choose(next, WAIT);
  }

  // The token nearest above or below; at the edge the one before or after.
  vertical(at, direction) {
    const { start, total } = this.data;
    const here = this.spans[at - start]?.getBoundingClientRect();
    if (!here) return start;
    const middle = (here.left + here.right) / 2;
    let best = null, row = null;
    for (let i = at - start + direction; i >= 0 && i < this.spans.length; i += direction) {
      const box = this.spans[i].getBoundingClientRect();
      const apart = direction > 0 ? box.top - here.top : here.top - box.top;
      if (apart < 6) continue;
      if (row === null) row = box.top;
      if (Math.abs(box.top - row) > 6) break;
      const off = Math.max(box.left - middle, middle - box.right, 0);
      if (best === null || off < best.off) best = { off, i };
    }
    if (best) return start + best.i;
    const beyond = direction > 0 ? start + this.spans.length : start - 1;
    return beyond >= 0 && beyond < total ? beyond : at;
  }

  // --- what a token's tooltip says

  hover(event) {
    const at = this.place(event.target);
    if (at === null || event.pointerType === "touch") return this.hide();
    this.fill(at - this.data.start);
    this.tip.showPopover?.();
    const box = event.target.closest(".t").getBoundingClientRect(), tip = this.tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, event.clientX - tip.width / 3), innerWidth - tip.width - 8);
    const below = box.bottom + 8, above = box.top - tip.height - 8;
    let top = below + tip.height <= innerHeight - 8 ? below : above;
    if (top < 8) {
      // Neither above nor below there is room: beside the pointer, so that the token stays in sight.
      top = Math.max(8, Math.min(below, innerHeight - tip.height - 8));
      const right = event.clientX + 28;
      this.tip.style.left = `${right + tip.width <= innerWidth - 8 ? right : Math.max(8, event.clientX - 28 - tip.width)}px`;
    } else this.tip.style.left = `${left}px`;
    this.tip.style.top = `${top}px`;
  }

  hide() {
    if (this.tip.matches(":popover-open")) this.tip.hidePopover();
  }

  fill(at) {
    const { data } = this;
    const n = this.spans.length, k = data.k;
    const name = make("div", "name", data.names ? data.names[at] ?? data.texts[at] : data.texts[at]);
    name.dir = "auto";
    const facts = [`token ${data.start + at}`, `id ${data.ids[at]}`];
    if (data.phases) facts.push(data.phases[at]);
    if (this.nll && Number.isFinite(this.nll[at])) facts.push(`nll ${this.nll[at].toFixed(2)}`);
    const fact = make("div", "facts", facts.join(" · "));
    if (data.predicted?.[at]) {
      const isolated = make("bdi", "", `“${data.predicted[at]}”`);
      fact.append(" · predicts ", isolated);
    }
    const tables = make("div", "tables");
    for (let first = 0; first < data.top_k.length; first += ROWS) {
      const table = make("table");
      const head = make("tr");
      const ranks = Math.min(k, RANKS);
      head.append(make("th", "", "layer"));
      for (let rank = 0; rank < ranks; rank++) head.append(make("th", "", rank === 0 ? "1st" : rank === 1 ? "2nd" : rank === 2 ? "3rd" : `${rank + 1}th`));
      if (k > RANKS) head.append(make("th", "", `+${k - RANKS}`));
      if (this.entropy) head.append(make("th", "", "entropy"));
      if (this.margin) head.append(make("th", "", "margin"));
      table.append(head);
      for (let layer = first; layer < Math.min(first + ROWS, data.top_k.length); layer++) {
        const row = make("tr", layer === data.layer ? "here" : "");
        row.append(make("th", "", layer));
        const from = (layer * n + at) * k;
        for (let rank = 0; rank < ranks; rank++) {
          const expert = this.experts[from + rank];
          const cell = make("td");
          if (expert !== 65535) {
            cell.append(make("b", "", expert));
            if (this.weights) {
              const weight = this.weights[from + rank];
              cell.append(make("small", "", weight.toFixed(2)));
              const share = Math.round(Math.min(weight, 1) * 45);
              cell.style.background = `color-mix(in srgb, var(--st-primary-color) ${share}%, transparent)`;
            }
          } else if (rank < data.top_k[layer]) cell.textContent = "–";
          row.append(cell);
        }
        if (k > RANKS) row.append(make("td", "", "…"));
        if (this.entropy) row.append(make("td", "", number(this.entropy[layer * n + at], 2)));
        if (this.margin) row.append(make("td", "", number(this.margin[layer * n + at], 3)));
        table.append(row);
      }
      tables.append(table);
    }
    this.tip.replaceChildren(name, fact, tables);
  }
}

// Triggers, not state: the server hears of a choice even if it is the one that this component made last.
export default function ({ parentElement, data, setTriggerValue }) {
  const root = parentElement.querySelector(".tokens");
  if (!VIEWS.has(root)) VIEWS.set(root, new View(root));
  const view = VIEWS.get(root);
  view.update(data, setTriggerValue);
  return () => view.hide();
}
