// The page at /docs: /openapi.json for people.

const make = (tag, content = "", attributes = {}, ...children) => {
  const element = document.createElement(tag);
  element.textContent = content;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

function table(label, head, rows) {
  const body = rows.map((cells) => make("tr", "", {}, ...cells.map((cell) => make("td", cell))));
  const wrapped = make("div", "", { class: "scroll", tabindex: "0", role: "region", "aria-label": label });
  wrapped.append(make("table", "", {}, make("thead", "", {}, make("tr", "", {}, ...head.map((h) => make("th", h)))),
    make("tbody", "", {}, ...body)));
  return wrapped;
}

function kind(schema = {}) {
  if (schema.anyOf) return schema.anyOf.map(kind).filter((one) => one !== "null").join(" or ");
  const bounds = [["minimum", "≥ "], ["exclusiveMinimum", "> "], ["maximum", "≤ "], ["exclusiveMaximum", "< "]]
    .filter(([key]) => key in schema).map(([key, sign]) => sign + schema[key]);
  return [schema.type || "any", ...bounds].join(", ");
}

function example(verb, path, operation) {
  const url = `${location.origin}${path}`;
  if (verb === "get") return `curl ${url}`;
  const bodies = Object.keys(operation.requestBody?.content || {});
  if (bodies.includes("image/jpeg")) return `curl --data-binary @picture.jpg ${url}`;
  if (bodies.length) return `curl -H 'Content-Type: ${bodies[0]}' --data @body.json ${url}`;
  return `curl -X POST ${url}`;
}

function section(verb, path, operation) {
  const part = make("section", "", { class: "card operation" });
  part.append(make("h2", "", {}, make("span", verb.toUpperCase(), { class: "verb" }), make("code", path)),
    make("p", operation.summary || ""));
  if (operation.description) part.append(make("p", operation.description.replaceAll("`", ""), { class: "soft" }));
  const parameters = operation.parameters || [];
  if (parameters.length) {
    part.append(table(`Parameters of ${verb} ${path}`, ["parameter", "in", "type", "meaning"], parameters.map((one) => [one.name, one.in, kind(one.schema),
      one.description || one.schema?.description || ""])));
  }
  const bodies = Object.keys(operation.requestBody?.content || {});
  if (bodies.length) part.append(make("p", `Body: ${bodies.join(", ")}`));
  part.append(table(`Answers of ${verb} ${path}`, ["status", "meaning"], Object.entries(operation.responses).map(([status, response]) =>
    [status, response.description.replaceAll("`", "")])));
  part.append(make("pre", example(verb, path, operation), { tabindex: "0", role: "region", "aria-label": `Call of ${verb} ${path}` }));
  return part;
}

const token = sessionStorage.getItem("token");
document.getElementById("programs").hidden = Boolean(token); // a link sends no token
const response = await fetch("/openapi.json", { headers: token ? { Authorization: `Bearer ${token}` } : {} });
if (response.ok) {
  const api = await response.json();
  document.getElementById("about").textContent = `${api.info.description.replaceAll("`", "")} Version ${api.info.version}.`;
  document.getElementById("operations").append(...Object.entries(api.paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([verb, operation]) => section(verb, path, operation))));
} else {
  document.getElementById("about").textContent = "This server asks for a token: give it on the first page.";
}
