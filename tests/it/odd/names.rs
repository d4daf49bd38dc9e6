//! Names that are not text, or that would control a terminal.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::process::Command;

use base64::Engine as _;

use super::image;
use crate::common::layers::Tar;
use crate::common::ocifs::{Ocifs, Said, bounded, isolate, tool};

fn odd_names() -> (Ocifs, String) {
    let tar = Tar::new()
        .file(b"caf\xe9", b"latin 1\n")
        .file(b"red\x1b[31m\nline", b"escape\n")
        .link(tar::EntryType::Symlink, "link", "to\x1b]0;title\x07")
        .dir("dir/")
        .file(b"dir/\xff\xfe", b"bytes\n");
    image(vec![tar.finish()])
}

fn bytes(name: &[u8]) -> OsString {
    OsString::from_vec(name.to_vec())
}

/// Runs a command with a terminal as its standard output.
fn on_a_terminal(ocifs: &Ocifs, arguments: &[&OsStr]) -> Said {
    let direct = ocifs.command(arguments);
    let words: Vec<_> = std::iter::once(direct.get_program()).chain(direct.get_args()).collect();
    let quoted = words.iter().map(|word| [b"'", word.as_bytes(), b"'"].concat());
    let line = OsString::from_vec(quoted.collect::<Vec<_>>().join(&b' '));
    let mut command = Command::new("script");
    isolate(&mut command, ocifs.home());
    command
        .env("OCIFS_CONFIG", "/dev/null")
        .arg("-qec")
        .arg(line)
        .arg("/dev/null");
    bounded(&mut command)
}

#[test]
fn paths_on_the_command_line_are_bytes() {
    let (ocifs, image) = odd_names();
    let run = |command: &str, path: &[u8]| ocifs.ok([OsStr::new(command), OsStr::new(&image), &bytes(path)]).stdout;
    assert_eq!(run("cat", b"caf\xe9"), b"latin 1\n");
    assert_eq!(run("cat", b"/dir/\xff\xfe"), b"bytes\n");
    assert!(run("ls", b"/").windows(4).any(|part| part == b"caf\xe9"));
    let missing = ocifs.run([OsStr::new("cat"), OsStr::new(&image), &bytes(b"\xe9")]);
    assert!(missing.stderr.contains("no such file"), "{missing:?}");

    // A layout, a store, a mount point and directories of changes have such names.
    let home = |name: &[u8]| ocifs.home().join(bytes(name));
    fs::rename(ocifs.home().join("image"), home(b"im\xe9")).unwrap();
    let mut image = bytes(b"oci:");
    image.push(home(b"im\xe9"));
    let (mountpoint, upper, work) = (home(b"mnt\xe9"), home(b"up\xe9"), home(b"work\xe9"));
    for directory in [&mountpoint, &upper, &work] {
        fs::create_dir(directory).unwrap();
    }
    let other = Ocifs::at(&home(b"store\xe9"));
    let said = other.ok([
        OsStr::new("mount"),
        "--json".as_ref(),
        "--upper".as_ref(),
        upper.as_ref(),
        "--work".as_ref(),
        work.as_ref(),
    ]
    .into_iter()
    .chain([&image as &OsStr, mountpoint.as_ref()]));
    let encoded = base64::engine::general_purpose::STANDARD.encode(mountpoint.as_os_str().as_bytes());
    let is_shown = |object: &serde_json::Value| {
        assert_eq!(object["mountpoint_base64"], *encoded, "{object}");
        assert_eq!(object["mountpoint"], *mountpoint.to_string_lossy(), "{object}");
    };
    let written = fs::write(mountpoint.join("new"), "new\n");
    let status = other.run([OsStr::new("status"), "--json".as_ref(), mountpoint.as_ref()]);
    let list = other.run(["list", "--json"]);
    let gone = other.run([OsStr::new("umount"), "--json".as_ref(), mountpoint.as_ref()]);
    written.unwrap();
    assert_eq!(gone.code, Some(0), "{gone:?}");
    assert_eq!(fs::read(upper.join("new")).unwrap(), b"new\n");
    is_shown(&said.json());
    is_shown(&status.json());
    is_shown(&gone.json());
    let rows = list.json();
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["mountpoint_base64"] == *encoded);
    is_shown(row.expect("it is listed"));
}

#[test]
fn json_says_how_names_are_encoded() {
    let (ocifs, image) = odd_names();
    let said = ocifs.ok(["ls", "--json", &image]);
    let rows: Vec<serde_json::Value> = said
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let row = |name: &str| {
        rows.iter()
            .find(|row| row["name"] == name)
            .unwrap_or_else(|| panic!("{name}: {rows:?}"))
    };
    assert_eq!(row("caf\u{fffd}")["name_base64"], "Y2Fm6Q==");
    assert!(row("red\x1b[31m\nline").get("name_base64").is_none());
    assert_eq!(row("link")["target"], "to\x1b]0;title\x07");
    assert_eq!(row("dir")["target"], serde_json::Value::Null);
}

#[test]
fn terminals_are_not_controlled_and_pipes_get_the_bytes() {
    let (ocifs, image) = odd_names();
    let piped = ocifs.ok(["ls", &image]).stdout;
    for part in [&b"caf\xe9\n"[..], b"red\x1b[31m\nline\n", b" -> to\x1b]0;title\x07\n"] {
        assert!(
            piped.windows(part.len()).any(|bytes| bytes == part),
            "{}",
            piped.escape_ascii()
        );
    }
    let shown = on_a_terminal(&ocifs, &["ls".as_ref(), image.as_ref()]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let text = shown.text();
    for part in [
        "caf\\xe9\r\n",
        "red\\u{1b}[31m\\nline\r\n",
        " -> to\\u{1b}]0;title\\u{7}\r\n",
    ] {
        assert!(text.contains(part), "no {part:?} in {text:?}");
    }
    assert!(!text.contains('\x1b'), "{text:?}");

    let said = on_a_terminal(&ocifs, &["export".as_ref(), image.as_ref()]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.text().contains("--output FILE"), "{said:?}");
}

#[test]
fn inspect_and_list_do_not_control_a_terminal_either() {
    let (ocifs, image) = odd_names();
    let path = ocifs.home().join("image");
    let config = |text: &str| {
        let index = fs::read_to_string(path.join("index.json")).unwrap();
        let blob = |digest: &str| path.join("blobs").join(digest.replace(':', "/"));
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let manifest = fs::read(blob(index["manifests"][0]["digest"].as_str().unwrap())).unwrap();
        let mut manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
        let mut config: serde_json::Value =
            serde_json::from_slice(&fs::read(blob(manifest["config"]["digest"].as_str().unwrap())).unwrap()).unwrap();
        config["config"] = serde_json::json!({"Env": [text], "User": text, "WorkingDir": text, "Cmd": [text]});
        let put = |bytes: &[u8], media_type: &str| {
            let descriptor = crate::common::layers::descriptor(media_type, bytes);
            fs::write(blob(descriptor["digest"].as_str().unwrap()), bytes).unwrap();
            descriptor
        };
        let config = put(
            config.to_string().as_bytes(),
            "application/vnd.oci.image.config.v1+json",
        );
        manifest["config"] = config;
        let manifest = put(manifest.to_string().as_bytes(), crate::common::registry::MANIFEST);
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(path.join("index.json"), index.to_string()).unwrap();
    };
    config("A=\x1b[31m\nuser      root\u{9b}2J");
    let shown = on_a_terminal(&ocifs, &["inspect".as_ref(), image.as_ref()]);
    assert!(
        shown
            .text()
            .contains("env       A=\\u{1b}[31m\\nuser      root\\u{9b}2J\r\n"),
        "{shown:?}"
    );
    let piped = ocifs.ok(["inspect", &image]);
    assert!(piped.text().contains("A=\x1b[31m\nuser"), "{piped:?}");

    let mountpoint = ocifs.home().join("m\x1b[31m\n");
    fs::create_dir(&mountpoint).unwrap();
    ocifs.ok([OsStr::new("mount"), image.as_ref(), mountpoint.as_ref()]);
    let shown = ["list", "status"].map(|command| {
        let mut arguments = vec![OsStr::new(command)];
        arguments.extend((command == "status").then_some(mountpoint.as_os_str()));
        on_a_terminal(&ocifs, &arguments)
    });
    ocifs.ok([OsStr::new("umount"), mountpoint.as_ref()]);
    for said in shown {
        assert_eq!(said.code, Some(0), "{said:?}");
        assert!(
            said.text().contains("m\\u{1b}[31m\\n") && !said.text().contains('\x1b'),
            "{said:?}"
        );
    }
}

#[test]
fn an_attribute_that_a_tar_cannot_hold_is_left_out_and_named() {
    // An engine ends the name at the first equals sign. So the name with an equals sign comes in the escaped form of
    // LIBARCHIVE, with its value in base64.
    let records: &[(&str, &[u8])] = &[("LIBARCHIVE.xattr.user.a%3Db", b"MQ"), ("SCHILY.xattr.user.fine", b"1")];
    let (ocifs, image) = image(vec![Tar::new().pax(records).file("file", b"x").finish()]);
    let tar = ocifs.home().join("out.tar");
    let said = ocifs.ok(["export", "--output", tar.to_str().unwrap(), &image]);
    assert!(
        said.stderr.contains("/file") && said.stderr.contains("user.a=b"),
        "{said:?}"
    );
    let root = ocifs.home().join("root");
    fs::create_dir(&root).unwrap();
    tool(
        "tar",
        [
            Path::new("--xattrs"),
            Path::new("--xattrs-include=*"),
            Path::new("-C"),
            &root,
            Path::new("-xf"),
            &tar,
        ],
    );
    let seen = tool(
        "getfattr",
        ["-dm-", "--absolute-names", root.join("file").to_str().unwrap()],
    );
    let seen = String::from_utf8(seen).unwrap();
    assert!(seen.contains("user.fine=\"1\"") && !seen.contains("user.a"), "{seen}");
    // An EROFS image can hold the attribute.
    let mount = ocifs.mount(&image);
    let seen = tool(
        "getfattr",
        ["-dm-", "--absolute-names", mount.join("file").to_str().unwrap()],
    );
    assert!(String::from_utf8(seen).unwrap().contains("user.a"));
}
