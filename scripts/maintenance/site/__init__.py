"""What the documentation site is made from besides its pages; see docs/site.md."""
