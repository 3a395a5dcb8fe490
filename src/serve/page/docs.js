// The documentation page: shows /openapi.json. What it reads becomes text nodes and attributes, never markup.

import { byId, element } from "./dom.js";

/** @typedef {Record<string, any>} Json */

/** @type {Json} the document */
let api = {};

/** The thing that a reference leads to. @param {Json} value @returns {Json} */
function resolved(value) {
  if (typeof value?.$ref !== "string") return value ?? {};
  const parts = value.$ref.split("/").slice(1);
  return parts.reduce((found, part) => found?.[part.replaceAll("~1", "/").replaceAll("~0", "~")], api) ?? {};
}

/** The name of a schema that is a reference, or "". @param {Json} schema */
const nameOf = (schema) => schema?.$ref?.split("/").at(-1) ?? "";

/** Where a schema is described. @param {string} name */
const schemaId = (name) => `schema-${name}`;

/** Where a route is described. @param {Json} operation */
const routeId = (operation) => `route-${operation.operationId}`;

/** A schema's type in a few words and links. @param {Json} schema @returns {(Node | string)[]} */
function type(schema) {
  const name = nameOf(schema);
  if (name) return [element("a", { href: `#${schemaId(name)}` }, name)];
  const choices = schema?.oneOf ?? schema?.anyOf ?? schema?.allOf;
  if (choices) {
    // Every field may be null, which is said once above.
    const real = choices.filter((/** @type {Json} */ choice) => choice.type !== "null");
    return joined(real.map(type), schema.allOf ? " and " : " or ");
  }
  if (schema?.enum) return [schema.enum.map((/** @type {unknown} */ value) => JSON.stringify(value)).join(" | ")];
  const types = [schema?.type ?? "any"].flat().filter((one) => one !== "null");
  if (types.includes("array")) return ["list of ", ...type(schema.items)];
  const values = schema?.additionalProperties;
  if (types.includes("object") && values && typeof values === "object") return ["object of ", ...type(values)];
  return [types.join(" or ")];
}

/** @param {(Node | string)[][]} lists @param {string} between @returns {(Node | string)[]} */
const joined = (lists, between) => lists.flatMap((list, index) => (index ? [between, ...list] : list));

/** Text with code between backticks. @param {string} words @returns {(Node | string)[]} */
const prose = (words) => words.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));

/** What is said of a field: by itself, or by the type that it may have. @param {Json} field @returns {string} */
const descriptionOf = (field) =>
  field.description ?? (field.oneOf ?? []).find((/** @type {Json} */ one) => one.description)?.description ?? "";

/** A schema's range and default. @param {Json} schema */
function limits(schema) {
  const { minimum, maximum, minItems, maxItems } = schema;
  const said = [];
  // That a count is not negative goes without saying.
  if (maximum !== undefined) said.push(`${minimum ?? "up"} to ${maximum}`);
  else if (minimum) said.push(`at least ${minimum}`);
  if (minItems) said.push(`at least ${minItems}`);
  if (maxItems) said.push(`at most ${maxItems}`);
  if (schema.default !== undefined) said.push(`default ${JSON.stringify(schema.default)}`);
  return said.join("; ");
}

/** Properties of a schema and of those it is made of, and the names of those that are required. @param {Json} schema */
function fieldsOf(schema) {
  const found = resolved(schema);
  /** @type {Json} */
  const properties = { ...found.properties };
  const required = new Set(found.required ?? []);
  for (const part of found.allOf ?? []) {
    const inner = fieldsOf(part);
    Object.assign(properties, inner.properties);
    for (const name of inner.required) required.add(name);
  }
  return { properties, required };
}

/** A path that may be broken before its slashes and underscores. @param {string} path @returns {(Node | string)[]} */
const breakable = (path) => path.split(/(?=[/_])/).flatMap((part, index) => (index ? [element("wbr"), part] : part));

/** A table of an object's fields, or null without any. @param {Json} schema */
function fields(schema) {
  const { properties, required } = fieldsOf(schema);
  const rows = Object.entries(properties).map(([name, field]) => {
    const said = limits(field);
    const needed = required.has(name) && element("span", { class: "required" }, " required");
    return element(
      "tr",
      {},
      element("td", {}, element("code", {}, name), needed),
      element("td", { class: "type" }, ...type(field)),
      element("td", {}, ...prose(descriptionOf(field)), said && ` (${said})`),
    );
  });
  if (!rows.length) return null;
  const head = ["Field", "Type", "Description"].map((title) => element("th", { scope: "col" }, title));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
  return element("div", { class: "fields", tabindex: "0", role: "group", "aria-label": "Fields" }, table);
}

/** The shell's spelling of a text. @param {string} text */
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** @param {string} method @param {string} path @param {Json} operation */
function curl(method, path, operation) {
  const example = operation.requestBody?.content?.["application/json"]?.example;
  const address = new URL(path.slice(1).replaceAll(/\{(\w+)\}/g, "$1"), document.baseURI).href;
  const words = [`curl ${quoted(address)}`];
  if (operation.security?.length && !operation.security.some(isNothing)) words.push('-H "Authorization: Bearer $KEY"');
  if (example) words.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(example))}`);
  else if (method !== "get") words.push(`-X ${method.toUpperCase()}`);
  return words.join(" \\\n  ");
}

/** @param {Json} requirement of no key */
const isNothing = (requirement) => Object.keys(requirement).length === 0;

/** @param {string} title @param {Json} content by type */
function contents(title, content) {
  const parts = Object.entries(content ?? {}).flatMap(([kind, { schema }]) => {
    const data = schema.properties?.data;
    const event = data?.contentSchema ?? data?.anyOf?.[0].contentSchema;
    const of = event ? ["events of ", ...type(event)] : type(schema);
    const note = schema.description ? [". ", ...prose(schema.description)] : [];
    return [element("p", {}, element("code", {}, kind), ": ", ...of, ...note)];
  });
  return parts.length ? [element("h4", {}, title), ...parts] : [];
}

/** @param {string} method @param {string} path @param {Json} operation */
function route(method, path, operation) {
  const body = operation.requestBody?.content;
  const open = operation.security?.length === 0;
  const responses = Object.entries(operation.responses);
  const errors = responses.filter(([status]) => status !== "200").map(([status, response]) =>
    element("li", {}, element("code", {}, status), ` ${response.description} `, ...errorType(response)),
  );
  return element(
    "section",
    { class: "route", id: routeId(operation), "aria-labelledby": `${routeId(operation)}-title` },
    element(
      "h3",
      { id: `${routeId(operation)}-title` },
      element("code", {}, element("span", { class: "method" }, method), path),
    ),
    element("p", {}, operation.summary, open && element("span", { class: "open" }, " · needs no key")),
    operation.description && element("p", {}, ...prose(operation.description)),
    element("pre", { tabindex: "0", role: "group", "aria-label": "Example" }, element("code", {}, curl(method, path, operation))),
    ...(operation.parameters ?? []).map((/** @type {Json} */ parameter) =>
      element("p", {}, element("code", {}, parameter.name), ": ", parameter.description),
    ),
    ...contents("Request", body),
    body && fields(body["application/json"].schema),
    ...contents("Reply", operation.responses["200"]?.content),
    errors.length > 0 && element("h4", {}, "Errors"),
    errors.length > 0 && element("ul", {}, ...errors),
  );
}

/** @param {Json} response */
function errorType(response) {
  const schema = response.content?.["application/json"]?.schema;
  return schema ? type(schema) : [];
}

/** A schema that is used by others. @param {string} name @param {Json} schema */
function schemaSection(name, schema) {
  return element(
    "section",
    { class: "route", id: schemaId(name), "aria-labelledby": `${schemaId(name)}-title` },
    element("h3", { id: `${schemaId(name)}-title` }, name),
    schema.description && element("p", {}, ...prose(schema.description)),
    fields(schema) ?? element("p", { class: "type" }, ...type(schema)),
    ...(schema.oneOf ?? []).map(fields),
  );
}

/** Shows the document. */
function show() {
  byId("version").textContent = api.info.version;
  byId("about").textContent = api.info.description;
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ method, path, operation })),
  );
  /** @type {Node[]} */
  const sections = [];
  /** @type {Node[]} */
  const links = [];
  for (const { name, description } of api.tags) {
    const own = operations.filter(({ operation }) => operation.tags.includes(name));
    const id = `api-${name}`;
    sections.push(element("h2", { id }, name), element("p", {}, ...prose(description)));
    sections.push(...own.map(({ method, path, operation }) => route(method, path, operation)));
    const items = own.map(({ path, operation }) =>
      element("li", {}, element("a", { href: `#${routeId(operation)}` }, element("code", {}, ...breakable(path)))),
    );
    links.push(element("h2", {}, name), element("ul", {}, ...items));
  }
  const schemas = Object.entries(api.components.schemas);
  sections.push(element("h2", { id: "schemas" }, "Types"), ...schemas.map(([name, one]) => schemaSection(name, one)));
  links.push(element("h2", {}, "Types"), element("ul", {}, element("li", {}, element("a", { href: "#schemas" }, "all"))));
  byId("routes").replaceChildren(...sections);
  byId("contents").replaceChildren(...links);
  // The place that the address names was not there when the browser looked for it.
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

try {
  const response = await fetch(new URL("openapi.json", document.baseURI));
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  api = await response.json();
  show();
} catch (error) {
  const text = `The document could not be read: ${error instanceof Error ? error.message : error}.`;
  byId("routes").replaceChildren(element("p", {}, text));
}
