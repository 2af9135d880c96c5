"""Files for the runtimes that people ship to: `compress export --for NAME`. A module a runtime, a row a runtime in
`deploy.targets.table`."""
