"""Pictures and widgets for the notebooks. The core never imports anything from here."""
