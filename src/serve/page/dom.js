// Builds DOM nodes. Text reaches the page only as text nodes and attributes, never as markup, so nothing that a model,
// a server or an imported file says can become an element.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element with attributes, listeners and children.
 *
 * A function under `onNAME` becomes a listener of the event NAME. `true` is an attribute without a value; `false`,
 * `null` and `undefined` are none. Children are nodes or strings; `null` and `false` are skipped.
 *
 * @param {string} name
 * @param {Record<string, unknown>} [attributes]
 * @param {...(Node | string | null | false | undefined)} children
 * @returns {any}
 */
export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key.slice(2), /** @type {EventListener} */ (value));
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, String(value));
  }
  for (const child of children) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

/**
 * An icon of index.html's sprite. It says nothing to a screen reader: the control around it has the label.
 *
 * @param {string} name
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button that shows an icon and is named by `label`, to screen readers and as a tooltip.
 *
 * @param {string} name the icon
 * @param {string} label
 * @param {(event: MouseEvent) => void} onclick
 * @param {Record<string, unknown>} [attributes]
 */
export function iconButton(name, label, onclick, attributes = {}) {
  return element(
    "button",
    { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes },
    icon(name),
  );
}

/**
 * The element of index.html with this id.
 *
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  const node = document.getElementById(id);
  if (!node) throw new Error(`index.html has no element #${id}`);
  return node;
}

/**
 * Has screen readers say `text` when they are done with what they are saying. The same text twice is said twice.
 *
 * @param {string} text
 */
export function announce(text) {
  const status = byId("announcements");
  status.textContent = "";
  // A live region is read when it changes, so the new text must come after the empty one was seen.
  setTimeout(() => (status.textContent = text), 50);
}

/**
 * Copies `text` and says so on `button` for a moment. Where the clipboard is closed to the page, as it is over HTTP from
 * another machine, the text is copied through a selection.
 *
 * @param {string} text
 * @param {HTMLButtonElement} button an icon button
 */
export async function copyText(text, button) {
  const copied = await copyToClipboard(text);
  announce(copied ? "Copied" : "The browser did not let the page copy");
  const label = button.getAttribute("aria-label");
  if (!copied || button.dataset.copied) return;
  button.dataset.copied = "true";
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"));
  button.title = "Copied";
  setTimeout(() => {
    button.replaceChildren(...before);
    button.title = label ?? "";
    delete button.dataset.copied;
  }, 1500);
}

/** @param {string} text */
async function copyToClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = /** @type {HTMLElement | null} */ (document.activeElement);
    const area = element("textarea", { class: "visually-hidden", readonly: true, "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}

/**
 * @param {number} count
 * @param {string} one the singular
 * @param {string} [many] the plural
 */
export function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}
