// Whoever uses a keyboard can scroll wide tables and code, and the search has a name for screen readers.
document$.subscribe(() => {
  for (const one of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    one.tabIndex = one.scrollWidth > one.clientWidth ? 0 : -1;
  }
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
});
