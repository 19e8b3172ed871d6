"""Code of the site: small Sphinx extensions, and the browser that looks at what they made."""
