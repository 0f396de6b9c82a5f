"""Answers each line with its number on the connection; reports 'ok' when all have ended.

Arguments: the status file, where the ports are told as well; how many connections there will be.
"""
import asyncio
import os
import socket
import sys

status, wanted = sys.argv[1], int(sys.argv[2])
served = 0
done = asyncio.Event()


def say(path, text):
    with open(path + '.new', 'w') as file:
        file.write(text)
    os.rename(path + '.new', path)


async def serve(reader, writer):
    global served
    number = 0
    while line := await reader.readline():
        number += 1
        writer.write(b'%d %s' % (number, line))
        await writer.drain()
    writer.close()
    # The answers are on their way before this process ends.
    await writer.wait_closed()
    served += 1
    if served == wanted:
        done.set()


async def main():
    # The last one takes clients of IPv4, too.
    both = socket.socket(socket.AF_INET6)
    both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    both.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    both.bind(('::', 0))
    limit = 1 << 22
    servers = [await asyncio.start_server(serve, host, 0, limit=limit) for host in ('127.0.0.1', '::1')]
    servers.append(await asyncio.start_server(serve, sock=both, limit=limit))
    ports = [str(server.sockets[0].getsockname()[1]) for server in servers]
    say(status + '.ports', ' '.join(ports))
    await done.wait()
    say(status, 'ok\n')

asyncio.run(main())
