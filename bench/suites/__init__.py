"""What is measured: `cases` has the shapes, `catalogue` the suites by name, the other files have one kind each."""
