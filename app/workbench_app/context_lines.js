// Contexts of tokens, a line each. Text from data is only ever put into textContent.
function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function token([text, weight, fires], className) {
  const element = make("span", className ?? (fires ? "fires" : ""), text);
  if (fires) element.style.setProperty("--strength", weight);
  return element;
}

function written(line, open) {
  const row = make("button");
  row.type = "button";
  row.setAttribute("role", "listitem");
  row.title = `Open text ${line.seq} at token ${line.pos}`;
  row.onclick = () => open([line.seq, line.pos]);
  const weight = make("span", "weight", line.weight === null ? `#${line.rank}` : line.weight.toFixed(3));
  const text = make("span", "line");
  text.dir = "auto";
  const at = line.parts.findIndex((part) => part[3]);
  const before = make("span", "before"), inner = make("bdi"), after = make("span", "after");
  inner.append(...line.parts.slice(0, at).map((part) => token(part)));
  before.append(inner);
  after.append(...line.parts.slice(at + 1).map((part) => token(part)));
  text.append(before, token(line.parts[at], "here"), after);
  const facts = make("span", "facts");
  for (const tag of line.tags) facts.append(make("bdi", "", tag));
  if (line.weight !== null) facts.append(make("span", "", `choice ${line.rank}`));
  facts.append(make("span", "link", `text ${line.seq}, token ${line.pos}`));
  row.append(weight, text, facts);
  return row;
}

export default function ({ parentElement, data, setTriggerValue }) {
  const root = parentElement.querySelector(".contexts");
  const open = (place) => setTriggerValue("open", place);
  root.replaceChildren(...data.lines.map((line) => written(line, open)));
}
