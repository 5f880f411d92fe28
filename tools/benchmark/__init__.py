"""What `lintra bench` measures and how: cases, checks, timing, reports."""
