"""What `engine.train --profile` leaves: a trace and a page that says where the time goes."""
