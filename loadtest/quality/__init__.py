"""Quality of answers under sparse attention: tasks with known answers, and how many of them sparse settings keep."""
