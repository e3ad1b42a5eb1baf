"""Generation: its speed beside the authors' loop, and what each cache saves and changes."""
