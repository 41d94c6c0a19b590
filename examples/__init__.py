"""Programs that use the plugin; README.md says how to run them."""
