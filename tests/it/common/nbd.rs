//! A client that speaks NBD byte by byte.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISCONNECT: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;

/// Time that an answer may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection in the transmission phase.
pub struct NbdClient {
    stream: UnixStream,
    pub size: u64,
    next: u64,
}

impl NbdClient {
    /// Connects and chooses the export by GO.
    pub fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        // Fixed newstyle, no zeros.
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT").unwrap();
        // GO, with an empty name and no information requests.
        for number in [7u32, 6, 0] {
            stream.write_all(&number.to_be_bytes()).unwrap();
        }
        stream.write_all(&0u16.to_be_bytes()).unwrap();
        let mut size = 0;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head).unwrap();
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            stream.read_exact(&mut data).unwrap();
            match kind {
                // The end of the answers.
                1 => break,
                // The export: type 0, size, flags.
                3 if data[..2] == [0, 0] => size = u64::from_be_bytes(data[2..10].try_into().unwrap()),
                3 => {}
                kind => panic!("answer {kind:#x}"),
            }
        }
        Self { stream, size, next: 0 }
    }

    /// Sends a request and returns its cookie.
    pub fn send(&mut self, command: u16, offset: u64, length: u32) -> u64 {
        self.next += 1;
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(command.to_be_bytes());
        request.extend(self.next.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        self.stream.write_all(&request).unwrap();
        self.next
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Receives the head of an answer: its cookie and its error number.
    pub fn head(&mut self) -> (u64, u32) {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (u64::from_be_bytes(head[8..].try_into().unwrap()), error)
    }

    /// Receives the data of an answer.
    pub fn data(&mut self, length: u32) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// Does one request, and returns the error number of its answer.
    pub fn call(&mut self, command: u16, offset: u64, length: u32) -> u32 {
        let cookie = self.send(command, offset, length);
        let (answered, error) = self.head();
        assert_eq!(answered, cookie);
        error
    }

    /// Reads. Returns the error number if the read fails.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.call(READ, offset, length) {
            0 => Ok(self.data(length)),
            error => Err(error),
        }
    }

    /// Whether the server has closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0]), Ok(0) | Err(_))
    }
}
