//! A virtual machine monitor and its guest's driver in one, with one virtqueue. It speaks vhost-user byte by byte. The
//! memory of its guest is a memory file.

use std::fs::File;
use std::io::{IoSlice, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
/// Status before there is an answer.
const NONE: u8 = 0xff;

/// Entries of the queue. A request takes three descriptors.
const ENTRIES: u16 = 64;
/// Number of requests at a time.
const SLOTS: u16 = 16;
/// Most bytes of a request.
pub const SLOT: u32 = 128 << 10;

/// Guest addresses.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x10000;
const MEMORY: u64 = DATA + SLOTS as u64 * SLOT as u64;
/// Where the monitor has the memory of the guest. It only has to differ from the guest's addresses.
const MONITOR: u64 = 0x7f00_0000_0000;

/// Time that an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The part that outlives a connection.
struct Guest {
    memory: File,
    /// Memory for requests in flight, once the first process has made it.
    inflight: Option<(Vec<u8>, OwnedFd)>,
    available: u16,
    used: u16,
}

pub struct VhostClient {
    stream: UnixStream,
    guest: Guest,
    kick: EventFd,
    call: EventFd,
    pub capacity: u64,
}

impl VhostClient {
    pub fn connect(socket: &Path) -> Self {
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(MEMORY).unwrap();
        let guest = Guest {
            memory,
            inflight: None,
            available: 0,
            used: 0,
        };
        Self::attach(socket, guest)
    }

    /// Connects again, as a monitor does when the process behind its disk was replaced.
    pub fn reconnect(self, socket: &Path) -> Self {
        Self::attach(socket, self.guest)
    }

    fn attach(socket: &Path, guest: Guest) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self {
            stream,
            guest,
            kick: EventFd::new().unwrap(),
            call: EventFd::new().unwrap(),
            capacity: 0,
        };
        client.send(3, &[], None);
        let features = client.ask_number(1);
        for bit in [5, 6, 9, 12, 26, 28, 29, 30, 32] {
            assert!(features >> bit & 1 == 1, "feature {bit}");
        }
        let protocol = client.ask_number(15);
        // CONFIG and INFLIGHT_SHMFD.
        let wanted: u64 = 1 << 9 | 1 << 12;
        assert_eq!(protocol & wanted, wanted);
        client.send(16, &wanted.to_ne_bytes(), None);
        // Without EVENT_IDX, each answer is signalled. Without LOG_ALL, pages are not logged.
        client.send(2, &(features & !(1 << 29 | 1 << 26)).to_ne_bytes(), None);
        let mut config = [0u32, 60, 0].map(u32::to_ne_bytes).concat();
        config.resize(72, 0);
        client.send(24, &config, None);
        let config = client.receive().0;
        client.capacity = u64::from_le_bytes(config[12..20].try_into().unwrap()) * 512;
        assert_eq!(
            u32::from_le_bytes(config[32..36].try_into().unwrap()),
            4096,
            "the block size"
        );
        let region = [0, MEMORY, MONITOR, 0].map(u64::to_ne_bytes).concat();
        let memory = client.guest.memory.as_raw_fd();
        client.send(5, &[&1u64.to_ne_bytes()[..], &region].concat(), Some(memory));
        client.set_inflight();
        client.start_queue();
        client
    }

    /// Gets the memory for requests in flight if there is none, and passes it on.
    fn set_inflight(&mut self) {
        if self.guest.inflight.is_none() {
            let mut wanted = vec![0; 24];
            wanted[16..18].copy_from_slice(&1u16.to_ne_bytes());
            wanted[18..20].copy_from_slice(&ENTRIES.to_ne_bytes());
            self.send(31, &wanted, None);
            let (made, file) = self.receive();
            self.guest.inflight = Some((made, file.unwrap()));
        }
        let (made, file) = self.guest.inflight.as_ref().unwrap();
        let (made, file) = (made.clone(), file.as_raw_fd());
        self.send(32, &made, Some(file));
    }

    fn start_queue(&mut self) {
        let pair = |a: u32, b: u32| [a, b].map(u32::to_ne_bytes).concat();
        self.send(8, &pair(0, ENTRIES.into()), None);
        // As monitors do after a disconnection: the first request that is not answered.
        self.send(10, &pair(0, self.guest.used.into()), None);
        let addresses = [MONITOR + DESCRIPTORS, MONITOR + USED, MONITOR + AVAILABLE, 0].map(u64::to_ne_bytes);
        self.send(9, &[pair(0, 0), addresses.concat()].concat(), None);
        let (kick, call) = (self.kick.as_raw_fd(), self.call.as_raw_fd());
        self.send(13, &0u64.to_ne_bytes(), Some(call));
        self.send(12, &0u64.to_ne_bytes(), Some(kick));
        self.send(18, &pair(0, 1), None);
        self.kick.write(1).unwrap();
    }

    /// Stops the queue. Returns the index of the next request.
    pub fn stop_queue(&mut self) -> u32 {
        self.send(11, &[0; 8], None);
        u32::from_ne_bytes(self.receive().0[4..8].try_into().unwrap())
    }

    /// Sends a message.
    pub fn send(&mut self, code: u32, payload: &[u8], fd: Option<RawFd>) {
        let head = [code, 1, payload.len() as u32].map(u32::to_ne_bytes).concat();
        let fds: Vec<RawFd> = fd.into_iter().collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        let slices = [IoSlice::new(&head), IoSlice::new(payload)];
        sendmsg::<()>(self.stream.as_raw_fd(), &slices, rights, MsgFlags::empty(), None).unwrap();
    }

    fn receive(&mut self) -> (Vec<u8>, Option<OwnedFd>) {
        let mut head = [0; 12];
        let mut space = nix::cmsg_space!(RawFd);
        let mut slices = [std::io::IoSliceMut::new(&mut head)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
        assert_eq!(message.bytes, 12, "the connection ended");
        let fd = message.cmsgs().unwrap().find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        let mut payload = vec![0; u32::from_ne_bytes(head[8..].try_into().unwrap()) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        // SAFETY: the kernel has just installed this descriptor for this process, and no other code knows it.
        #[allow(unsafe_code)]
        let fd = fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        (payload, fd)
    }

    fn ask_number(&mut self, code: u32) -> u64 {
        self.send(code, &[], None);
        u64::from_ne_bytes(self.receive().0.try_into().unwrap())
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.guest.memory.write_all_at(bytes, address).unwrap();
    }

    fn read_u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        self.guest.memory.read_exact_at(&mut bytes, address).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Writes a descriptor.
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(DESCRIPTORS + 16 * u64::from(index), &bytes);
    }

    /// Makes the chain that begins at a descriptor available, and kicks.
    pub fn offer(&mut self, head: u16) {
        let ring = AVAILABLE + 4 + 2 * u64::from(self.guest.available % ENTRIES);
        self.write(ring, &head.to_le_bytes());
        self.guest.available = self.guest.available.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.guest.available.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    /// Submits a request in a slot. Data that is longer than a slot goes into the next ones too.
    pub fn submit(&mut self, slot: u16, kind: u32, offset: u64, length: u32) {
        assert!(slot < SLOTS && length <= u32::from(SLOTS - slot) * SLOT);
        let wide = u64::from(slot);
        let header = [
            kind.to_le_bytes().to_vec(),
            vec![0; 4],
            (offset / 512).to_le_bytes().to_vec(),
        ]
        .concat();
        self.write(HEADERS + 16 * wide, &header);
        self.write(STATUS + wide, &[NONE]);
        let first = slot * 3;
        self.describe(first, HEADERS + 16 * wide, 16, NEXT, first + 1);
        self.describe(
            first + 1,
            DATA + wide * u64::from(SLOT),
            length,
            NEXT | WRITE,
            first + 2,
        );
        self.describe(first + 2, STATUS + wide, 1, WRITE, 0);
        self.offer(first);
    }

    /// Waits for the next answer. Returns its first descriptor and the number of bytes that were written.
    pub fn answer(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        while self.read_u16(USED + 2) == self.guest.used {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut entry = [0; 8];
        let at = USED + 4 + 8 * u64::from(self.guest.used % ENTRIES);
        self.guest.memory.read_exact_at(&mut entry, at).unwrap();
        self.guest.used = self.guest.used.wrapping_add(1);
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        (number(&entry[..4]) as u16, number(&entry[4..]))
    }

    /// Whether there is an answer.
    pub fn has_answer(&self) -> bool {
        self.read_u16(USED + 2) != self.guest.used
    }

    /// The status of the request in a slot.
    pub fn status(&self, slot: u16) -> u8 {
        let mut status = [0];
        self.guest
            .memory
            .read_exact_at(&mut status, STATUS + u64::from(slot))
            .unwrap();
        status[0]
    }

    /// The data of the request in a slot.
    pub fn data(&self, slot: u16, length: u32) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        let at = DATA + u64::from(slot) * u64::from(SLOT);
        self.guest.memory.read_exact_at(&mut data, at).unwrap();
        data
    }

    /// Does one request. Returns its status and data.
    pub fn call(&mut self, kind: u32, offset: u64, length: u32) -> (u8, Vec<u8>) {
        self.submit(0, kind, offset, length);
        assert_eq!(self.answer().0, 0);
        // The answer is signalled too, perhaps a moment after it is in the ring.
        let mut signalled = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        let patience = PollTimeout::try_from(PATIENCE).unwrap();
        assert_eq!(nix::poll::poll(&mut signalled, patience), Ok(1), "no signal");
        self.call.read().unwrap();
        (self.status(0), self.data(0, length))
    }

    /// Reads the whole disk, several requests at a time.
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; self.capacity as usize];
        let pieces: Vec<(u64, u32)> = (0..self.capacity)
            .step_by(SLOT as usize)
            .map(|offset| (offset, (self.capacity - offset).min(SLOT.into()) as u32))
            .collect();
        let mut pending = [None; SLOTS as usize];
        let mut todo = pieces.into_iter();
        let mut left = 0;
        for slot in 0..SLOTS {
            if let Some((offset, length)) = todo.next() {
                self.submit(slot, IN, offset, length);
                pending[usize::from(slot)] = Some((offset, length));
                left += 1;
            }
        }
        while left > 0 {
            let slot = self.answer().0 / 3;
            let (offset, length) = pending[usize::from(slot)].take().expect("an answer to a request");
            assert_eq!(self.status(slot), OK, "{offset}");
            bytes[offset as usize..][..length as usize].copy_from_slice(&self.data(slot, length));
            left -= 1;
            if let Some((offset, length)) = todo.next() {
                self.submit(slot, IN, offset, length);
                pending[usize::from(slot)] = Some((offset, length));
                left += 1;
            }
        }
        bytes
    }
}
