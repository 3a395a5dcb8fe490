// Small values that the browser keeps: across visits in localStorage, or for one tab in sessionStorage. A browser that
// closes them to the page, as with all cookies blocked, keeps them until the page is closed.

/** @type {Map<string, string>} */
const memory = new Map();
const PREFIX = "aotron.";

/** @param {boolean} tab @returns {Storage | null} */
function area(tab) {
  try {
    return tab ? sessionStorage : localStorage;
  } catch {
    return null;
  }
}

/**
 * @param {string} name
 * @param {boolean} [tab] of this tab only
 * @returns {string} "" if there is none
 */
export function preference(name, tab = false) {
  return area(tab)?.getItem(PREFIX + name) ?? memory.get(name) ?? "";
}

/**
 * @param {string} name
 * @param {string} value "" removes it
 * @param {boolean} [tab] of this tab only
 */
export function setPreference(name, value, tab = false) {
  memory.delete(name);
  try {
    const storage = area(tab);
    if (value === "") storage?.removeItem(PREFIX + name);
    else if (storage) storage.setItem(PREFIX + name, value);
    else memory.set(name, value);
  } catch {
    memory.set(name, value);
  }
}
