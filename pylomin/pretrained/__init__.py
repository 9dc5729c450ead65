"""Models from the directories that other libraries save, with weights that stay where they are."""
