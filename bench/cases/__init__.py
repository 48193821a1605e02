"""One file a case: `run(quick) -> rows`. A file here is a case; the command finds it by its name."""
