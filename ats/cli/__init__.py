"""The command lines of the package, a module each with `main(argv)`; the files in `tools/` call them."""
