"""Load, speed and quality measurements of the plugin, and the small model they run on."""
