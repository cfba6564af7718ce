// Continuations side by side. Text from data is only ever put into textContent.
const VIEWS = new WeakMap();
const PAUSE = 130; // ms from one picture to the question for the next: about 7 a second at most
const LOST = 3000; // ms after which an answer isn't waited for any longer

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

class View {
  constructor(root) {
    this.root = root;
    this.panels = new Map();
    root.addEventListener("click", (event) => {
      const token = event.target.closest?.(".t");
      if (token) this.choose(token.at);
    });
    root.addEventListener("keydown", (event) => this.key(event));
  }

  update(data, component) {
    this.component = component;
    if (this.data?.name !== data.name || data.panels.some((panel) => !this.panels.has(panel.name))) this.begin(data);
    this.data = data;
    for (const panel of data.panels) this.write(panel);
    this.mark(data.chosen);
    this.ask(PAUSE);
  }

  // What has been written in the meantime; once more should the answer get lost.
  ask(wait) {
    clearTimeout(this.timer);
    if (!this.data.running) return;
    this.timer = setTimeout(() => {
      this.component.setTriggerValue("tick", Date.now());
      this.ask(LOST);
    }, wait);
  }

  begin(data) {
    this.panels.clear();
    this.root.replaceChildren(
      ...data.panels.map((panel) => {
        const element = make("section", "panel");
        const head = make("header");
        const title = make("h4", "", panel.title);
        const note = make("span", "note");
        head.append(title, note);
        const text = make("div", "text");
        text.dir = "auto";
        text.tabIndex = 0;
        text.setAttribute("role", "listbox");
        text.setAttribute("aria-label", panel.title);
        element.dataset.name = panel.name;
        element.append(head, text);
        this.panels.set(panel.name, { note, text, spans: [] });
        return element;
      }),
    );
  }

  write(panel) {
    const { note, text, spans } = this.panels.get(panel.name);
    if (note.textContent !== panel.note) note.textContent = panel.note;
    const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 24;
    while (spans.length > panel.texts.length) spans.pop().remove();
    panel.texts.forEach((piece, at) => {
      let span = spans[at];
      if (span === undefined) {
        span = make("span", "t");
        span.at = at;
        span.setAttribute("role", "option");
        spans.push(span);
        text.append(span);
      }
      if (span.textContent !== piece) span.textContent = piece;
      span.classList.toggle("piece", piece === "");
    });
    const differ = new Set(panel.differ);
    spans.forEach((span, at) => {
      span.classList.toggle("differs", differ.has(at));
      span.classList.toggle("first", at === panel.first);
      span.title = `token ${at}${at === panel.first ? ": the first that differs" : ""}`;
    });
    if (this.data.running && atEnd) text.scrollTop = text.scrollHeight;
  }

  mark(chosen) {
    this.chosen = chosen;
    for (const { spans } of this.panels.values()) {
      spans.forEach((span, at) => {
        span.classList.toggle("chosen", at === chosen);
        span.setAttribute("aria-selected", String(at === chosen));
      });
    }
  }

  choose(at) {
    this.mark(at);
    this.component.setStateValue("chosen", { name: this.data.name, at, when: Date.now() });
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    const most = Math.max(...this.data.panels.map((panel) => panel.texts.length)) - 1;
    if (most < 0) return;
    event.preventDefault();
    const at = Math.min(Math.max((this.chosen ?? -step) + step, 0), most);
    this.mark(at);
    clearTimeout(this.keyed);
    this.keyed = setTimeout(() => this.choose(at), 150);
  }
}

export default function (component) {
  const root = component.parentElement.querySelector(".streams");
  if (!VIEWS.has(root)) VIEWS.set(root, new View(root));
  const view = VIEWS.get(root);
  view.update(component.data, component);
  return () => {
    if (view.component === component) clearTimeout(view.timer); // not that of a later call
  };
}
