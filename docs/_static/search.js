// A page that was opened as a file may not read others, so that excerpts of results would only make errors.
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
