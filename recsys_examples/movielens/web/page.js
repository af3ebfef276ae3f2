// Only convenience: without it, the list of movies is whole and the form works.
const search = document.getElementById("search");
const labels = [...document.querySelectorAll(".choices label")];
document.getElementById("searching").hidden = false;
search.addEventListener("input", () => {
  const wanted = search.value.trim().toLowerCase();
  for (const label of labels) {
    const ticked = label.querySelector("input").checked;
    label.hidden = !ticked && !label.textContent.toLowerCase().includes(wanted);
  }
});
search.addEventListener("keydown", (event) => {
  if (event.key === "Enter") event.preventDefault();
});
