// Keeps conversations in the browser's IndexedDB, and tells the page's other tabs what changed.

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {{id: string, title: string, updated: number}} Summary what the list of conversations shows */

const DATABASE = "aotron";
const VERSION = 1;
const CONVERSATIONS = "conversations";
// The list is read at every start; conversations are read one at a time, since probabilities make them large.
const SUMMARIES = "summaries";

/** @param {Conversation} conversation @returns {Summary} */
function summary({ id, title, updated }) {
  return { id, title, updated };
}

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, VERSION);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(CONVERSATIONS, { keyPath: "id" });
      request.result.createObjectStore(SUMMARIES, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("another tab holds an older version of the database open"));
  });
}

/** Conversations by id. Every method rejects with the browser's error if it cannot read or write. */
export class ConversationStorage {
  /** @type {IDBDatabase | null} */
  #database;
  /** Stands in for the database where the browser offers none. @type {Map<string, string>} */
  #memory = new Map();
  /** @type {BroadcastChannel} */
  #channel = new BroadcastChannel(DATABASE);

  /** @param {IDBDatabase | null} database */
  constructor(database) {
    this.#database = database;
  }

  /** Opens the database; without one, conversations last until the page is closed (`isLasting` is false). */
  static async open() {
    try {
      return new ConversationStorage(await openDatabase());
    } catch {
      return new ConversationStorage(null);
    }
  }

  get isLasting() {
    return this.#database !== null;
  }

  /**
   * Calls `listener` with the id of each conversation that another tab writes or removes, or null for all of them.
   *
   * @param {(id: string | null) => void} listener
   */
  onChangeElsewhere(listener) {
    this.#channel.onmessage = (event) => listener(typeof event.data === "string" ? event.data : null);
  }

  /** All summaries, the most recently updated first. @returns {Promise<Summary[]>} */
  async list() {
    const all = this.#database
      ? await result(this.#database.transaction(SUMMARIES).objectStore(SUMMARIES).getAll())
      : Array.from(this.#memory.values(), (text) => summary(JSON.parse(text)));
    return all.sort((a, b) => b.updated - a.updated);
  }

  /** @param {string} id @returns {Promise<Conversation | undefined>} */
  async get(id) {
    if (this.#database) {
      return result(this.#database.transaction(CONVERSATIONS).objectStore(CONVERSATIONS).get(id));
    }
    const text = this.#memory.get(id);
    return text === undefined ? undefined : JSON.parse(text);
  }

  /** @param {Conversation} conversation */
  async put(conversation) {
    if (this.#database) {
      await this.#write((conversations, summaries) => {
        conversations.put(conversation);
        summaries.put(summary(conversation));
      });
    } else {
      this.#memory.set(conversation.id, JSON.stringify(conversation));
    }
    this.#channel.postMessage(conversation.id);
  }

  /** @param {string} id */
  async remove(id) {
    this.#memory.delete(id);
    await this.#write((conversations, summaries) => {
      conversations.delete(id);
      summaries.delete(id);
    });
    this.#channel.postMessage(id);
  }

  async clear() {
    this.#memory.clear();
    await this.#write((conversations, summaries) => {
      conversations.clear();
      summaries.clear();
    });
    this.#channel.postMessage(null);
  }

  /**
   * Does `change` as one transaction: all of it happens or none.
   *
   * @param {(conversations: IDBObjectStore, summaries: IDBObjectStore) => void} change
   * @returns {Promise<void>}
   */
  async #write(change) {
    if (!this.#database) return;
    const transaction = this.#database.transaction([CONVERSATIONS, SUMMARIES], "readwrite");
    change(transaction.objectStore(CONVERSATIONS), transaction.objectStore(SUMMARIES));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = () => resolve(undefined);
      transaction.onabort = () => reject(transaction.error);
      transaction.onerror = () => reject(transaction.error);
    });
  }
}
