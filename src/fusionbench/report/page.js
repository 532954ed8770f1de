"use strict";
// Sorting by a click on, or Enter in, the header of a column: what has no number comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", header.dataset.sort || "none");
    button.addEventListener("click", () => {
      const words = column === 0 || header.classList.contains("words");
      const now = header.getAttribute("aria-sort");
      const up = now === "none" ? words : now === "descending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[table.tBodies.length - 1];
      const value = (row) => {
        const cell = row.cells[column];
        if (words) return cell.textContent;
        return cell.dataset.v === undefined ? (up ? Infinity : -Infinity) : Number(cell.dataset.v);
      };
      const compare = (a, b) => (words ? a.localeCompare(b) : a === b ? 0 : a - b);
      const rows = [...body.rows].map((row) => [value(row), row]);
      rows.sort(([a], [b]) => (up ? compare(a, b) : compare(b, a)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// What is ticked in a legend is shown in all charts beside it.
for (const group of document.querySelectorAll(".toggled")) {
  group.addEventListener("change", ({ target }) => {
    for (const part of group.querySelectorAll(`svg [data-series="${target.dataset.series}"]`)) {
      part.classList.toggle("off", !target.checked);
    }
  });
}

// Where the numbers of a row come from, in front of the page.
const dialog = document.getElementById("about");
const show = (number) => {
  const facts = document.getElementById(`run-${number}`);
  const title = document.createElement("h2");
  title.textContent = facts.previousElementSibling.textContent;
  const close = document.createElement("button");
  close.type = "button";
  close.className = "close";
  close.textContent = "close";
  close.addEventListener("click", () => dialog.close());
  const copy = facts.cloneNode(true);
  copy.removeAttribute("id");
  dialog.replaceChildren(title, close, copy);
  dialog.showModal();
};
document.addEventListener("click", (event) => {
  const row = event.target.closest("tr[data-run]");
  const cell = event.target.closest("td[data-run]") || row;
  if (!cell || String(getSelection())) return;
  event.preventDefault();
  show(cell.dataset.run);
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
