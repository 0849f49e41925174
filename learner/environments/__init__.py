"""What is trained on: data sets, made-up tasks and rewards, as environments that responses act upon."""
