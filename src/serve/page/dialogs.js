// The small dialogs: a question before something is deleted, and the API key.

import { apiKey, setApiKey } from "./api.js";
import { byId } from "./dom.js";

/** Closes a dialog by its buttons that have `data-close`, and by a click beside it. @param {HTMLDialogElement} dialog */
export function makeClosable(dialog) {
  for (const button of dialog.querySelectorAll("[data-close]")) button.addEventListener("click", () => dialog.close());
  dialog.addEventListener("pointerdown", (event) => {
    const box = dialog.getBoundingClientRect();
    const inside =
      event.clientX >= box.left &&
      event.clientX <= box.right &&
      event.clientY >= box.top &&
      event.clientY <= box.bottom;
    if (event.target === dialog && !inside) dialog.close();
  });
}

/**
 * Asks before something is deleted.
 *
 * @param {string} title a question
 * @param {string} text what will be gone
 * @returns {Promise<boolean>} whether to delete it
 */
export function confirmDeletion(title, text) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  return ask(dialog, (done) => {
    byId("confirm-yes").onclick = () => done(true);
  });
}

/**
 * Asks for the server's API key and keeps it.
 *
 * @param {string} reason what the server said
 * @returns {Promise<boolean>} whether there is a new key
 */
export function askForKey(reason) {
  const dialog = byId("key");
  const input = byId("key-input");
  const error = byId("key-error");
  byId("key-text").textContent = reason;
  input.value = apiKey();
  error.textContent = "";
  return ask(dialog, (done) => {
    byId("key-form").onsubmit = (/** @type {SubmitEvent} */ event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) {
        error.textContent = key ? "A key has only ASCII letters, digits and marks, and no spaces." : "Enter the key.";
        input.focus();
        return;
      }
      setApiKey(key);
      done(true);
    };
  });
}

/**
 * Opens `dialog` until it is closed or answered.
 *
 * @param {HTMLDialogElement} dialog
 * @param {(done: (answer: boolean) => void) => void} listen sets what answers it
 * @returns {Promise<boolean>} false if it was closed
 */
function ask(dialog, listen) {
  return new Promise((resolve) => {
    let answer = false;
    dialog.onclose = () => resolve(answer);
    listen((given) => {
      answer = given;
      dialog.close();
    });
    // A dialog that is open already asks the newer question.
    if (!dialog.open) dialog.showModal();
  });
}
