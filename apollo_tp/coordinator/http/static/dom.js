// Elements from text (never from HTML), rows that are updated in place, and figures as people write them.
export const $ = id => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.map(child => child instanceof Node ? child : String(child ?? "")));
  return node;
}

/** Sets a text only if it is another one: selections and screen readers are left alone. */
export function text(node, value) {
  const wanted = String(value);
  if (node.textContent !== wanted) node.textContent = wanted;
}

export const show = (node, visible) => { if (node.hidden === visible) node.hidden = !visible; };

/** Children of `parent`, one for each item: kept by key, so that focus, selection and scroll survive. */
export function keyed(parent, items, key, make, update = () => {}) {
  const keys = new Set(items.map(item => String(key(item))));
  const old = new Map();
  for (const node of [...parent.children]) keys.has(node.dataset.key) ? old.set(node.dataset.key, node) : node.remove();
  let at = parent.firstElementChild;
  for (const item of items) {
    const id = String(key(item)), node = old.get(id) || make(item);
    node.dataset.key = id;
    update(node, item);
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
}

/** Rows of texts; `classes` are those of the cells. */
export function textRows(body, items, key, cells, classes = []) {
  keyed(body, items, key, item => el("tr", {}, ...cells(item).map((_, i) => el("td", { class: classes[i] }))),
    (row, item) => cells(item).forEach((value, i) => text(row.cells[i], value)));
}

export const number = (x, digits = 0) => x == null || !Number.isFinite(x) ? "–" :
  x.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

/** A number with `digits` significant digits. */
export function figure(x, digits = 4) {
  if (x == null || !Number.isFinite(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return x.toExponential(Math.max(0, digits - 2));
  const decimals = size === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return x.toLocaleString("en", { maximumFractionDigits: decimals, minimumFractionDigits: size < 1000 ? decimals : 0 });
}

export const milliseconds = seconds => seconds == null ? "–" : `${figure(1000 * seconds, 3)} ms`;

export function duration(s) {
  if (s == null) return "";
  if (s < 60) return `${Math.ceil(s)} s`;
  return s < 3600 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
}

export function bytes(count) {
  if (!count) return "–";
  const power = Math.min(4, Math.floor(Math.log10(count) / 3));
  return `${figure(count / 1000 ** power, 3)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

/** Of today the time, else the day too. */
export function moment(seconds) {
  if (!seconds) return "";
  const when = new Date(1000 * seconds), time = when.toLocaleTimeString("en-GB");
  if (when.toDateString() === new Date().toDateString()) return time;
  return `${when.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time.slice(0, 5)}`;
}

export function command(code) {
  const note = el("button", { type: "button", "aria-label": `Copy the command ${code.split("\n")[0]}` }, "Copy"), shown = el("pre", { tabindex: "0" }, code);
  note.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code);
      note.textContent = "Copied";
    } catch { // browsers allow it on https and on this machine alone
      getSelection().selectAllChildren(shown);
      note.textContent = "Selected";
    }
    setTimeout(() => { note.textContent = "Copy"; }, 2000);
  });
  return el("div", { class: "copy" }, shown, note);
}

/** Asks before what cannot be undone; true if the answer was yes. */
export function confirmed(title, body, yes) {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = body;
  $("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(done => dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true }));
}

export function announce(message) { $("announce").textContent = message; }
