// A name for the dialog of the search, which Material leaves without one.
document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
