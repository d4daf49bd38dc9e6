//! Disks from their start to their end.

use nix::sys::signal::Signal;

use super::{layers, registry};
use crate::common::disk::{ServedDisk, text};
use crate::common::nbd::NbdClient;
use crate::common::ocifs::{Ocifs, alive, eventually, mountpoint, send, wait};

#[test]
fn a_disk_is_found_by_every_door() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    for place in 0..3 {
        let disk = ServedDisk::serve(&ocifs, &image, &[]);
        for place in disk.places() {
            let status = ocifs.ok(["status", "--json", text(&place)]).json();
            assert_eq!(
                (&status["state"], status["pid"].as_u64()),
                (&"ready".into(), Some(disk.pid.into()))
            );
            assert_eq!(status["disk"]["vhost_user_blk"], text(&disk.vhost()));
        }
        let shown = ocifs.ok(["status", text(&disk.vhost())]).text().to_owned();
        for door in disk.places() {
            assert!(shown.contains(text(&door)), "{shown}");
        }
        let listed = ocifs.ok(["list"]).text().to_owned();
        assert!(disk.places().iter().all(|door| listed.contains(text(door))), "{listed}");
        let said = disk.umount(&disk.places()[place], &[]);
        assert_eq!(said.code, Some(0), "{said:?}");
        disk.assert_gone();
    }
}

#[test]
fn a_disk_in_use_stays() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let mut client = NbdClient::connect(&disk.nbd());
    let said = disk.umount(&disk.vhost(), &[]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.stderr.contains("connected: 1") && said.stderr.contains("--lazy"),
        "{said:?}"
    );
    assert!(client.read(0, 4096).is_ok());
    // An open file keeps it as well.
    let file = std::fs::File::open(disk.file()).unwrap();
    drop(client);
    eventually("the client is gone", || {
        let said = disk.umount(&disk.nbd(), &[]);
        said.stderr.contains("busy")
    });
    assert_eq!(disk.status()["state"], "ready");
    let mut client = NbdClient::connect(&disk.nbd());
    let said = disk.umount(&disk.nbd(), &["--lazy"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(said.stderr.contains("one client is connected"), "{said:?}");
    assert!(!disk.nbd().exists() && !disk.file().exists());
    // What is connected goes on.
    assert!(client.read(0, 4096).is_ok());
    let listed = ocifs.ok(["list"]).text().to_owned();
    assert!(listed.contains("detached"), "{listed}");
    drop(file);
    assert!(alive(disk.pid));
    drop(client);
    disk.assert_gone();
}

#[test]
fn the_doors_of_a_killed_process_are_used_again() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let mut disk = ServedDisk::serve(&ocifs, &image, &[]);
    for clears in [false, true] {
        send(disk.pid, Signal::SIGKILL);
        eventually("the process is dead", || !alive(disk.pid));
        assert!(disk.nbd().exists() && disk.vhost().exists());
        let listed = ocifs.ok(["list"]).text().to_owned();
        assert!(listed.contains("dead"), "{listed}");
        if clears {
            let said = disk.umount(&disk.vhost(), &[]);
            assert_eq!(said.code, Some(0), "{said:?}");
            disk.assert_gone();
        }
        disk.restart(&image, &[]);
        assert!(NbdClient::connect(&disk.nbd()).read(0, 4096).is_ok());
        assert!(disk.file().exists());
    }
}

#[test]
fn doors_that_cannot_be_opened_are_named() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let error = ocifs.fails(["disk", &image]);
    assert!(error.contains("--nbd"), "{error}");
    let directory = mountpoint();
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = ocifs.fails(["disk", "--vhost-user-blk", text(&file), &image]);
    assert!(error.contains(text(&file)) && error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let error = ocifs.fails(["disk", "--nbd", "/no/such/directory/socket", &image]);
    assert!(error.contains("/no/such/directory"), "{error}");
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    for (option, place) in [
        ("--nbd", disk.nbd()),
        ("--vhost-user-blk", disk.nbd()),
        ("--file", disk.places()[0].clone()),
    ] {
        let error = ocifs.fails(["disk", option, text(&place), &image]);
        assert!(error.contains("already") && error.contains(text(&place)), "{error}");
    }
    assert_eq!(disk.status()["state"], "ready");
}

#[test]
fn signals_end_a_disk() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let mut client = NbdClient::connect(&disk.nbd());
    send(disk.pid, Signal::SIGTERM);
    disk.assert_gone();
    assert!(client.is_closed());
}

#[test]
fn a_stopped_process_with_clients_is_not_ended() {
    let (_registry, image) = registry();
    let ocifs = Ocifs::new();
    let disk = ServedDisk::serve(&ocifs, &image, &[]);
    let client = NbdClient::connect(&disk.nbd());
    send(disk.pid, Signal::SIGSTOP);
    eventually("it is stopped", || {
        let listed = ocifs.ok(["list"]).text().to_owned();
        listed.contains("no answer")
    });
    let said = disk.umount(&disk.nbd(), &["--lazy"]);
    assert!(said.stderr.contains("one client is connected"), "{said:?}");
    assert!(alive(disk.pid));
    drop(client);
    // A child that another test starts has the client's end of the connection until it runs its program.
    eventually("the process ends", || {
        let said = disk.umount(&disk.nbd(), &[]);
        assert!(said.code == Some(0) || said.stderr.contains("one client"), "{said:?}");
        !alive(disk.pid)
    });
}

/// A process that has not opened its doors yet owns nothing at their places.
#[test]
fn a_stopped_process_that_prepares_leaves_files_alone() {
    let (registry, image) = registry();
    registry.hold(&layers()[0].path());
    let ocifs = Ocifs::new();
    let directory = mountpoint();
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let mut serving = ocifs
        .command(["disk", "--vhost-user-blk", text(&file), &image])
        .spawn()
        .unwrap();
    let status = || ocifs.run(["status", "--json", text(&file)]);
    eventually("the process is registered", || status().code == Some(0));
    let pid = status().json()["pid"].as_u64().unwrap() as u32;
    send(pid, Signal::SIGSTOP);
    eventually("it is stopped", || status().json()["state"] == "unresponsive");
    ocifs.ok(["umount", text(&file)]);
    eventually("the process ends", || !alive(pid));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert!(!wait(&mut serving, "the command").success());
}
