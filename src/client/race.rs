//! Happy eyeballs: of the addresses that a name resolves to, the first that answers.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The next address is tried when the last has not answered for so long (RFC 8305), or has failed.
const STAGGER: Duration = Duration::from_millis(250);

/// Connects to whichever is first; each gets `each` at most. Those that come later are dropped.
///
/// Cost: one address, nothing but `connect`; several, a short-lived thread for each that was tried.
pub(super) fn connect_first(
    addresses: &[SocketAddr],
    deadline: Instant,
    each: Duration,
) -> io::Result<TcpStream> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut last = io::Error::new(io::ErrorKind::TimedOut, "the host name was not resolved in time");
    if left().is_zero() {
        return Err(last);
    }
    if let [address] = addresses {
        return TcpStream::connect_timeout(address, left().min(each));
    }
    let (sender, answers) = channel();
    let (mut rest, mut running) = (addresses.iter().copied(), 0);
    loop {
        let more = match rest.next() {
            Some(address) if !left().is_zero() => {
                let (sender, timeout) = (sender.clone(), left().min(each));
                std::thread::Builder::new().name("zeo connect".into()).spawn(move || {
                    let _ = sender.send(TcpStream::connect_timeout(&address, timeout));
                })?;
                running += 1;
                true
            }
            _ => false,
        };
        if running == 0 {
            return Err(last);
        }
        // A thread that was started answers by itself within its time.
        match answers.recv_timeout(if more { STAGGER } else { left().max(STAGGER) }) {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => {
                running -= 1;
                last = error;
            }
            Err(RecvTimeoutError::Timeout) if more => {}
            Err(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "no address of the host answered in time",
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use socket2::{Domain, Socket, Type};

    use super::*;

    /// One whose queue is full: who connects waits until the time is over.
    fn silent() -> (Socket, Vec<Socket>) {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap();
        let fillers = (0..4).map(|_| {
            let filler = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            filler.set_nonblocking(true).unwrap();
            let _ = filler.connect(&address);
            filler
        });
        let fillers = fillers.collect();
        (listener, fillers)
    }

    #[test]
    fn an_address_that_says_nothing_does_not_hold_up_the_next() {
        const LONG: Duration = Duration::from_secs(100);
        let (full, _fillers) = silent();
        let full = full.local_addr().unwrap().as_socket().unwrap();
        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let start = Instant::now();
        let addresses = [full, refused, good.local_addr().unwrap()];
        let socket = connect_first(&addresses, start + LONG, LONG).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), good.local_addr().unwrap());
        assert!(start.elapsed() < LONG / 2);
    }

    #[test]
    fn the_last_failure_is_told() {
        let refused = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
        for addresses in [&refused[..1], &refused[..]] {
            let error =
                connect_first(addresses, Instant::now() + Duration::from_secs(30), Duration::from_secs(30));
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
        let none = connect_first(&[], Instant::now() + Duration::from_secs(30), Duration::from_secs(30));
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
