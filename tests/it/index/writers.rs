//! gzip streams of all programs that write layers.

use std::fs;
use std::process::Command;

use ocifs::index::{Compression, SPACING, sniff};

use super::{CONTENT, check, file, filter, gzip, pass};
use crate::common::docker_registry::skopeo_copy;
use crate::common::layers::Blob;
use crate::common::oci_layout;

#[test]
fn gzip_of_every_level() {
    for level in ["-1", "-6", "-9"] {
        let index = check(&gzip(level, &CONTENT), &CONTENT);
        let restarts = index.spans().filter(|&span| index.restart_for(span) == span).count();
        assert!(
            restarts > CONTENT.len() / (400 << 10),
            "{level}: only {restarts} restarts"
        );
    }
}

#[test]
fn default_spacing_keeps_the_index_small() {
    let blob = gzip("-6", &CONTENT);
    let (_, index, _) = pass(&blob, SPACING, 1 << 16, 1 << 16).unwrap();
    let size = file(&index).len();
    assert!(
        size * 1000 < blob.len() * 15,
        "{size} bytes of index for {} bytes of gzip",
        blob.len()
    );
}

#[test]
fn pigz_with_and_without_independent_blocks() {
    check(&filter("pigz", &["-nc"], &CONTENT), &CONTENT);
    check(&filter("pigz", &["-nci"], &CONTENT), &CONTENT);
}

/// Go's pgzip: skopeo, podman, buildah and umoci push its streams.
#[test]
fn what_container_tools_write() {
    let directory = tempfile::tempdir().unwrap();
    let (plain, packed) = (directory.path().join("plain"), directory.path().join("packed"));
    let image = oci_layout::write(&plain, &[Blob::plain(CONTENT.clone())]);
    skopeo_copy(&[], &image, &format!("oci:{}:latest", packed.display()));
    let mut layers = 0;
    for entry in fs::read_dir(packed.join("blobs/sha256")).unwrap() {
        let blob = fs::read(entry.unwrap().path()).unwrap();
        if sniff(&blob) == Ok(Compression::Gzip) {
            check(&blob, &CONTENT);
            layers += 1;
        }
    }
    assert_eq!(layers, 1);
}

/// Go's standard gzip writer: docker, ko and the builders of Bazel push its streams.
#[test]
fn what_the_standard_library_of_go_writes() {
    const PROGRAM: &str = r#"package main

import (
	"compress/gzip"
	"io"
	"log"
	"os"
	"strconv"
)

func main() {
	level, err := strconv.Atoi(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	writer, err := gzip.NewWriterLevel(os.Stdout, level)
	if err != nil {
		log.Fatal(err)
	}
	if _, err = io.Copy(writer, os.Stdin); err != nil {
		log.Fatal(err)
	}
	if err = writer.Close(); err != nil {
		log.Fatal(err)
	}
}
"#;
    let directory = tempfile::tempdir().unwrap();
    let (source, program) = (directory.path().join("main.go"), directory.path().join("gzip"));
    fs::write(&source, PROGRAM).unwrap();
    let built = Command::new("go")
        .args(["build", "-o"])
        .args([&program, &source])
        .env("GOCACHE", directory.path().join("cache"))
        .env("GO111MODULE", "off")
        .env("GOTOOLCHAIN", "local")
        .status()
        .unwrap_or_else(|error| panic!("these tests need go (golang-go): {error}"));
    assert!(built.success());
    // The levels are Huffman only, none, fastest, the default and best.
    for level in ["-2", "0", "1", "-1", "9"] {
        check(&filter(program.to_str().unwrap(), &[level], &CONTENT), &CONTENT);
    }
}
