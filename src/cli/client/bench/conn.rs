//! One HTTP/1.1 connection that asks one thing after another, and costs as little as it can: requests are written from a buffer that is
//! used again, answers are parsed in place and their bodies skipped. The generator shares its machine with what it measures.

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Answers with more headers are refused.
const MAX_HEADERS: usize = 64;
/// Larger heads are refused.
const MAX_HEAD: usize = 64 << 10;
const READ_BUFFER: usize = 16 << 10;

/// An open connection.
pub(super) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    closing: bool,
}

/// How a body ends.
#[derive(Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
    /// With the connection.
    Close,
}

#[derive(Debug)]
struct Head {
    status: u16,
    bytes: usize,
    framing: Framing,
    closes: bool,
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

impl Connection {
    pub(super) async fn open(address: &str) -> io::Result<Connection> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            buffer: vec![0; READ_BUFFER],
            filled: 0,
            closing: false,
        })
    }

    /// Whether the server will close it: no more requests.
    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Sends a request, reads the whole answer, returns its status.
    pub(super) async fn exchange(&mut self, request: &[u8]) -> io::Result<u16> {
        self.stream.write_all(request).await?;
        let head = loop {
            match parse_head(self.buffer.get(..self.filled).unwrap_or_default())? {
                // An interim answer: the real one follows.
                Some(head) if head.status < 200 => self.consume(head.bytes),
                Some(head) => break head,
                None => self.fill().await?,
            }
        };
        self.closing = head.closes || head.framing == Framing::Close;
        self.consume(head.bytes);
        match head.framing {
            Framing::Length(length) => self.skip(length).await?,
            Framing::Chunked => self.skip_chunks().await?,
            Framing::Close => while self.stream.read(&mut self.buffer).await? > 0 {},
        }
        Ok(head.status)
    }

    async fn fill(&mut self) -> io::Result<()> {
        if self.filled == self.buffer.len() {
            if self.buffer.len() >= MAX_HEAD {
                return Err(invalid("the answer's head is too large"));
            }
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
        let free = self.buffer.get_mut(self.filled..).unwrap_or_default();
        match self.stream.read(free).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                self.filled += read;
                Ok(())
            }
        }
    }

    fn consume(&mut self, bytes: usize) {
        let bytes = bytes.min(self.filled);
        self.buffer.copy_within(bytes..self.filled, 0);
        self.filled -= bytes;
    }

    async fn skip(&mut self, mut bytes: usize) -> io::Result<()> {
        loop {
            let here = bytes.min(self.filled);
            self.consume(here);
            bytes -= here;
            if bytes == 0 {
                return Ok(());
            }
            self.fill().await?;
        }
    }

    async fn skip_chunks(&mut self) -> io::Result<()> {
        loop {
            let line = self.line().await?;
            let text = std::str::from_utf8(&line).map_err(|_| invalid("a chunk's size is not text"))?;
            let digits = text.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(digits, 16).map_err(|_| invalid("a chunk's size is not a number"))?;
            if size == 0 {
                while !self.line().await?.is_empty() {}
                return Ok(());
            }
            self.skip(size.saturating_add(2)).await?;
        }
    }

    /// A line without its end.
    async fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            let filled = self.buffer.get(..self.filled).unwrap_or_default();
            if let Some(at) = filled.windows(2).position(|pair| pair == b"\r\n") {
                let line = filled.get(..at).unwrap_or_default().to_vec();
                self.consume(at + 2);
                return Ok(line);
            }
            self.fill().await?;
        }
    }
}

/// The head at the beginning of `bytes`, once it is all there.
fn parse_head(bytes: &[u8]) -> io::Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let bytes = match response.parse(bytes) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(invalid(&error.to_string())),
    };
    let status = response.code.unwrap_or(0);
    let mut framing = Framing::Close;
    let mut closes = response.version == Some(0);
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let length = std::str::from_utf8(header.value).ok().and_then(|text| text.trim().parse().ok());
            framing = Framing::Length(length.ok_or_else(|| invalid("Content-Length is not a number"))?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            framing = Framing::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") {
            closes |= header.value.eq_ignore_ascii_case(b"close");
        }
    }
    if status < 200 || status == 204 || status == 304 {
        framing = Framing::Length(0);
    }
    Ok(Some(Head {
        status,
        bytes,
        framing,
        closes,
    }))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Serves `answers` on one connection, one byte at a time if asked, whatever is asked.
    async fn server(answers: &'static [&'static str], dribble: bool) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1];
            for answer in answers {
                stream.read_exact(&mut request).await.unwrap();
                let step = if dribble { 1 } else { answer.len() };
                for piece in answer.as_bytes().chunks(step) {
                    stream.write_all(piece).await.unwrap();
                    stream.flush().await.unwrap();
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn bodies_of_every_framing_are_skipped_to_their_end() {
        const ANSWERS: &[&str] = &[
            "HTTP/1.1 201 Created\r\ncontent-length: 3\r\n\r\nabc",
            "HTTP/1.1 204 No Content\r\n\r\n",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n1;x=y\r\nd\r\n0\r\nt: x\r\n\r\n",
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        ];
        for dribble in [false, true] {
            let mut connection = Connection::open(&server(ANSWERS, dribble).await).await.unwrap();
            for status in [201, 204, 200] {
                assert_eq!(connection.exchange(b"x").await.unwrap(), status);
                assert!(!connection.is_closing());
            }
            assert_eq!(connection.exchange(b"x").await.unwrap(), 404);
            assert!(connection.is_closing());
        }
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_an_error() {
        let mut connection = Connection::open(&server(&["HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab"], false).await)
            .await
            .unwrap();
        assert_eq!(connection.exchange(b"x").await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_not_http_is_refused() {
        assert!(parse_head(b"SSH-2.0\r\n\r\n").is_err());
        assert!(parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n").is_err());
        assert!(parse_head(b"HTTP/1.1 200 OK\r\n").unwrap().is_none());
    }
}
