//! Odd images: whiteouts in all forms, access control lists, numbers out of range, layers of unusual kinds. The mount
//! must show what image engines or the kernel's own file systems show.

mod foreign;
mod names;
mod permissions;
mod values;
mod whiteouts;

use crate::common::layers::Blob;
use crate::common::oci_layout;
use crate::common::ocifs::Ocifs;

/// Returns the program, and an image of these tars.
fn image(tars: Vec<Vec<u8>>) -> (Ocifs, String) {
    let ocifs = Ocifs::new();
    let layers: Vec<Blob> = tars.iter().map(|tar| Blob::gzip(tar)).collect();
    let image = oci_layout::write(&ocifs.home().join("image"), &layers);
    (ocifs, image)
}
