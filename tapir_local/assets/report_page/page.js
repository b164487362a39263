"use strict";
// Every text of a run is put into the page as text (textContent), never as HTML.
const FIRST = 10; // rows of answers that are shown at first
const STEP = 40; // rows of answers that each click adds

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// Answers

function resultMark(round, result, scores) {
  const sign = result === 1 ? "✓ " : result === 0 ? "✗ " : "";
  const mark = make("span", "mark" + (result === 1 ? " good" : result === 0 ? " bad" : ""), sign + round);
  if (scores) mark.title = "student : teacher  " + scores.join(" : ");
  return mark;
}

function answerBox(who, text, scores, result) {
  const box = make("div");
  const head = make("p", "who");
  head.style.margin = "0";
  head.append(make("span", result === 1 ? "mark good" : result === 0 ? "mark bad" : "", who));
  if (scores) head.append(make("span", "", scores.join(" : ")));
  box.append(head, make("pre", "", text === "" ? "(empty)" : text));
  return box;
}

function roundTitle(name) {
  return /^\d+$/.test(name) ? "round " + name : name;
}

function answerRow(data, row, open) {
  const [id, task, asked, teacher, answers, scores, results] = row;
  const article = make("article", "row");
  article.id = data.prefix + id;
  const about = make("div", "about");
  const link = make("a", "", id);
  link.href = "#" + encodeURIComponent(article.id);
  const marks = make("span", "marks");
  data.rounds.forEach((round, at) => marks.append(resultMark(round, results[at], scores[at])));
  about.append(link, make("span", "", task), marks);
  const details = make("details");
  details.append(make("summary", "", "answers"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.querySelector(".said")) return;
    const said = make("div", "said");
    said.append(answerBox("teacher", teacher));
    data.rounds.forEach((round, at) => said.append(answerBox(roundTitle(round), answers[at], scores[at], results[at])));
    details.append(said);
  });
  details.open = open;
  article.append(about, make("p", "asked", asked), details);
  return article;
}

function startBrowser(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const search = root.querySelector("input");
  const [task, result] = root.querySelectorAll("select");
  const place = root.querySelector(".rows");
  const more = root.querySelector(".more");
  const count = root.querySelector(".count");
  let found = [];
  let shown = 0;

  function addRows(open) {
    const part = document.createDocumentFragment();
    const next = Math.min(found.length, shown + (shown ? STEP : FIRST));
    for (const row of found.slice(shown, next)) part.append(answerRow(data, row, open));
    shown = next;
    place.append(part);
    more.hidden = shown >= found.length;
    more.textContent = "Show " + Math.min(STEP, found.length - shown) + " more";
  }

  function matches(row, words) {
    if (task.value && row[1] !== task.value) return false;
    if (result && result.value && row[7] !== result.value) return false;
    if (!words) return true;
    return [row[0], row[2], row[3], ...row[4]].some((text) => text.toLowerCase().includes(words));
  }

  function list(only) {
    const words = search.value.trim().toLowerCase();
    found = only ? data.rows.filter((row) => row[0] === only) : data.rows.filter((row) => matches(row, words));
    shown = 0;
    place.replaceChildren();
    addRows(Boolean(only));
    const total = data.rows.length.toLocaleString("en") + (data.rows.length === 1 ? " row" : " rows");
    count.textContent = found.length === data.rows.length ? total : found.length.toLocaleString("en") + " of " + total;
    if (only) {
      more.hidden = false;
      more.textContent = "Show all rows";
    }
  }

  let single = false;
  function refresh() {
    single = false;
    list();
  }
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 120);
  });
  task.addEventListener("change", refresh);
  if (result) result.addEventListener("change", refresh);
  more.addEventListener("click", () => (single ? refresh() : addRows(false)));
  list();
  return (id) => {
    const only = id.startsWith(data.prefix) ? id.slice(data.prefix.length) : "";
    if (!data.rows.some((row) => row[0] === only)) return false;
    search.value = task.value = "";
    if (result) result.value = "";
    single = true;
    list(only);
    place.firstElementChild.scrollIntoView();
    return true;
  };
}

const browsers = Array.from(document.querySelectorAll(".browser"), startBrowser);

function openTarget() {
  let id = location.hash.slice(1);
  try {
    id = decodeURIComponent(id);
  } catch (error) {
    return; // not a link of this page
  }
  if (id) browsers.some((find) => find(id));
}
window.addEventListener("hashchange", openTarget);
openTarget();

// On a phone the facts of a run would fill the first screens

if (window.matchMedia("(max-width: 700px)").matches) {
  for (const facts of document.querySelectorAll("header > details")) facts.open = false;
}

// Tables: a click on a head sorts by that column

function sortValue(row, column) {
  const cell = row.cells[column];
  return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
}

function compareValues(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  if (typeof one === "number") return -1; // numbers before dashes
  if (typeof other === "number") return 1;
  return one.localeCompare(other, "en", { numeric: true });
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = button.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const column = head.cellIndex;
    const rows = Array.from(body.rows);
    rows.sort((one, other) => down * compareValues(sortValue(one, column), sortValue(other, column)));
    body.append(...rows);
  });
}

// Copy as Markdown

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = button.parentElement.nextElementSibling;
    const status = button.parentElement.querySelector("[role=status]");
    try {
      await navigator.clipboard.writeText(source.value);
      status.textContent = "copied";
    } catch (error) {
      source.hidden = false; // the browser does not allow it: select the text for the reader
      source.select();
      status.textContent = "copy the selected text";
    }
  });
}

// The values of marks in charts

const tip = document.getElementById("tip");
function showTip(event) {
  const mark = event.target.closest ? event.target.closest(".chart .role-mark [aria-label]") : null;
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const right = Math.max(4, window.innerWidth - tip.offsetWidth - 8);
  tip.style.left = Math.min(event.clientX + 12, right) + "px";
  tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
}
document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);
