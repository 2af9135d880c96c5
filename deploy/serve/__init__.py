"""An HTTP server over the runtimes: `serve` in `deploy.serve.server` is what `compress serve` calls."""
