//! The image argument: a reference, or a path that need not be UTF-8.

use std::ffi::OsString;

use ocifs::oci::{ImageRef, ImageRefError};

/// An image as the user wrote it. Its path can have any bytes. Messages show it as text, with U+FFFD for bytes that
/// are not UTF-8.
#[derive(Debug, Clone)]
pub(super) struct ImageName {
    given: OsString,
    text: String,
}

impl ImageName {
    /// Parses the image reference.
    pub(super) fn reference(&self) -> Result<ImageRef, ImageRefError> {
        ImageRef::from_os_str(&self.given)
    }
}

impl From<OsString> for ImageName {
    fn from(given: OsString) -> Self {
        let text = given.to_string_lossy().into_owned();
        Self { given, text }
    }
}

impl std::ops::Deref for ImageName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

impl std::fmt::Display for ImageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}
