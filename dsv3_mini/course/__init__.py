"""What a course needs: claims to vote on, tasks, exercise checks."""
